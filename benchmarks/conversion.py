"""Memory and speed of converting a Hugging Face folder to a distributed checkpoint and back.

    python -m benchmarks.conversion              # 1.5 billion parameters, Qwen2.5-1.5B's shape, bfloat16: 3.1 GB
    python -m benchmarks.conversion --quick      # 0.1 billion, once

Each direction is the command-line tool in a process of its own; the folder that comes back is compared byte for byte.
All of it is done three times, and the medians are shown.

memory      peak of the process's RssAnon, sampled every 10 ms, beyond that of an interpreter that has imported nothing
rate        bytes of weights a second from start to end; hashing, and for a checkpoint its verification, included
copy        cp of the same folder to the same disk, fsync included: reading and writing once; the mean of the copies
            before and after a conversion. What is read is dropped from the page cache before, and some seconds pass:
            a virtual machine gives free memory back to its host, and what starts before that is several times faster.
CPU         user and system time: what does not depend on who else uses the machine
start-up    of Python with torch and transformers: some seconds, whatever the size
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_writer import HfWriter, index_text, plain_layout
from dapo_megatron.weights.table import hf_shapes, parameter_mappings

ROOT = Path(__file__).parents[1]
SIZES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"num_attention_heads": 12, "num_key_value_heads": 2},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
    "0.1B": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 151_936}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
}
MEMORY_LIMIT = 1.2e9
RATE_LIMIT = 0.5
"""Of the copy's, start-up included."""
ROUNDS = 3
START_UP = """
from dapo_megatron.process import importing, leave
with importing():
    from dapo_megatron.checkpoint.conversion import hf_to_dist
hf_to_dist.read_model({!r})
leave(0)
"""
SETTLE_S = 10
"""The kernel's free page reporting takes two seconds to begin."""


def write_model(folder: Path, size: str) -> None:
    """A random Qwen2 model, tensor by tensor."""
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", **SIZES[size]}
    config |= {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shape = read_model(folder)
    sizes = {
        name: (torch.bfloat16, s)
        for mapping in parameter_mappings(shape).values()
        for name, s in zip(mapping.hf, hf_shapes(mapping, shape), strict=True)
    }
    layout = plain_layout(sizes)
    writer = HfWriter(folder, layout)
    generator = torch.Generator().manual_seed(0)
    for name, (dtype, s) in sizes.items():
        writer.write(name, torch.empty(s, dtype=dtype).normal_(generator=generator))
    writer.sync()
    writer.close()
    if len(layout) > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(layout))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, and wait until the memory is as free as it gets."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    time.sleep(SETTLE_S)


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a folder through to the disk."""
    forget(source)
    start = time.monotonic()
    shutil.copytree(source, target)
    for path in target.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


class Measured(NamedTuple):
    """What a process took."""

    seconds: float
    cpu: float
    """Seconds."""
    peak: int
    """RssAnon in bytes."""


def measured(*command: str | Path) -> Measured:
    """Run a process with this interpreter."""
    start, before, peak = time.monotonic(), cpu_seconds(resource.RUSAGE_CHILDREN), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    return Measured(time.monotonic() - start, cpu_seconds(resource.RUSAGE_CHILDREN) - before, peak)


def cpu_seconds(who: int) -> float:
    """User and system time so far."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it has ended."""
    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon")), 0)


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        subprocess.run(["cmp", "--silent", a / name, b / name], check=False).returncode == 0 for name in names
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.1 billion parameters")
    parser.add_argument("--folder", type=Path, help="disk to measure (default: the one for temporary files)")
    args = parser.parse_args()
    size, rounds = ("0.1B", 1) if args.quick else ("1.5B", ROUNDS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return run(Path(folder), size, rounds)


def run(folder: Path, size: str, rounds: int) -> int:
    source, dist, back = folder / "hf", folder / "dist", folder / "back"
    directions = {
        "to distributed": (source, dist, "tools.convert_hf_to_dist"),
        "to Hugging Face": (dist, back, "tools.convert_dist_to_hf"),
    }
    write_model(source, size)
    weights = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    bare = measured("-c", "import time; time.sleep(0.3)").peak
    start_up = min(measured("-c", START_UP.format(str(source))) for _ in range(2))
    copies = [copied(source, folder / "copy")]
    runs: dict[str, list[tuple[Measured, float]]] = {name: [] for name in directions}
    faults = []
    for _ in range(rounds):
        for name, (read, written, tool) in directions.items():
            forget(read)
            conversion = measured("-m", tool, read, written)
            copies.append(copied(source, folder / "copy"))
            runs[name].append((conversion, (copies[-2] + copies[-1]) / 2))
        if not same(source, back):
            faults.append("the folder that came back is another")
        shutil.rmtree(dist)
        shutil.rmtree(back)
    table = Table("", "seconds", "of the CPU", "MB/s", "of the copy", "without start-up", "memory GB")
    table.title = f"conversion: {size}, {weights / 1e9:.1f} GB, {rounds} times"
    for name, pairs in runs.items():
        seconds, cpu = (statistics.median(column) for column in zip(*(m[:2] for m, _ in pairs), strict=True))
        whole = statistics.median(copy / m.seconds for m, copy in pairs)
        share = statistics.median(copy / max(m.seconds - start_up.seconds, 1e-3) for m, copy in pairs)
        memory = max(m.peak for m, _ in pairs) - bare
        without = f"{share:.2f}" if seconds > 1.5 * start_up.seconds else ""
        rates = f"{weights / seconds / 1e6:.0f}", f"{whole:.2f}", without
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", *rates, f"{memory / 1e9:.2f}")
        if whole < RATE_LIMIT and size != "0.1B":
            faults.append(f"{name}: slower than {RATE_LIMIT} of the copy")
        if memory > MEMORY_LIMIT:
            faults.append(f"{name}: more than {MEMORY_LIMIT / 1e9} GB")
    copy = statistics.median(copies)
    table.add_row("copy", f"{copy:.1f}", "", f"{weights / copy / 1e6:.0f}", "", "", "")
    table.add_row("start-up", f"{start_up.seconds:.1f}", f"{start_up.cpu:.1f}", "", "", "", "")
    Console().print(table)
    print("\n".join(faults) or "the folder that came back is the same, byte for byte")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
