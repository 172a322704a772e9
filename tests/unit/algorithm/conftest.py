"""Property tests share two busy cores with other tests: an example may take long without being wrong."""

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
