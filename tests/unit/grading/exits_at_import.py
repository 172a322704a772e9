"""A user module that takes its process down when it is imported."""

import os

os._exit(5)
