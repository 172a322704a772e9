"""The keys of one run: made by its launcher, read by its processes, in a file that their owner alone can read.

Engines answer only to the API key; the controller only to the trainer (ZeroMQ CURVE, both ends by key).
"""

import os
import secrets
from pathlib import Path

import msgspec
import yaml
import zmq

from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder


class CurvePair(msgspec.Struct, frozen=True):
    """One end of the link between trainer and controller; Z85 text."""

    public: str
    secret: str


class Keys(msgspec.Struct, frozen=True):
    """What the processes of a run know each other by."""

    engine_api_key: str
    controller: CurvePair
    trainer: CurvePair


def make_keys() -> Keys:
    """New random keys."""
    return Keys(secrets.token_hex(24), _pair(), _pair())


def write_keys(folder: RunFolder, keys: Keys) -> None:
    """Put the keys into the run folder, for the run's processes and, as SGLang's options, for its engines."""
    write_private(folder.keys, msgspec.json.encode(keys))
    write_private(folder.engine_options, yaml.safe_dump({"api-key": keys.engine_api_key}).encode())


def read_keys(folder: RunFolder) -> Keys:
    """The keys of a run.

    Raises:
        ConfigError: there are none, or they are not readable.
    """
    try:
        return msgspec.json.decode(folder.keys.read_bytes(), type=Keys)
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"{folder.keys} cannot be read ({e}): the launcher writes it; start the run anew") from None


def write_private(path: Path, data: bytes) -> None:
    """Write a file that is its owner's alone from the first byte on."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as f:
        f.write(data)


def _pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(public.decode(), secret.decode())
