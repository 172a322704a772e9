"""Memory and speed of converting a Hugging Face folder to a distributed checkpoint and back.

    python -m benchmarks.conversion              # 1.5 billion parameters, Qwen2.5-1.5B's shape, bfloat16: 3.1 GB
    python -m benchmarks.conversion --quick      # 0.1 billion

Each direction is the command-line tool in a process of its own; the folder that comes back is compared byte for byte.

memory      peak of the process's RssAnon, sampled every 10 ms, beyond that of an interpreter that has imported nothing
rate        bytes of weights a second from start to end; hashing, and for a checkpoint its verification, included
copy        cp of the same folder to the same disk, fsync included: reading and writing once; the mean of the copies
            before and after a conversion. What is read is dropped from the page cache before.
CPU         user and system time: what does not depend on who else uses the machine
start-up    of Python with torch and transformers: some seconds, whatever the size
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
"""Of the copy's."""


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
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


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


def measured(*command: str | Path) -> tuple[float, float, int]:
    """(seconds, seconds of the CPU, peak RssAnon in bytes) of a process."""
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
    return time.monotonic() - start, cpu_seconds(resource.RUSAGE_CHILDREN) - before, peak


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
    size = "0.1B" if args.quick else "1.5B"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return run(Path(folder), size)


def run(folder: Path, size: str) -> int:
    source, dist, back = folder / "hf", folder / "dist", folder / "back"
    write_model(source, size)
    weights = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    bare = measured("-c", "import time; time.sleep(0.3)")[2]
    code = f"from dapo_megatron.checkpoint.conversion import hf_to_dist; hf_to_dist.read_model({str(source)!r})"
    started, started_cpu, _ = min(measured("-c", code) for _ in range(2))
    copies, copies_cpu = [], []

    def copy_once() -> None:
        before = cpu_seconds(resource.RUSAGE_SELF)
        copies.append(copied(source, folder / "copy"))
        copies_cpu.append(cpu_seconds(resource.RUSAGE_SELF) - before)

    copy_once()
    table = Table("", "seconds", "of the CPU", "MB/s", "of the copy", "without start-up", "memory GB")
    table.title = f"conversion: {size}, {weights / 1e9:.1f} GB"
    faults = []
    for name, read, command in (
        ("to distributed", source, ("-m", "tools.convert_hf_to_dist", source, dist)),
        ("to Hugging Face", dist, ("-m", "tools.convert_dist_to_hf", dist, back)),
    ):
        forget(read)
        seconds, cpu, peak = measured(*command)
        copy_once()
        copy = sum(copies[-2:]) / 2
        share, memory = copy / max(seconds - started, 1e-3), peak - bare
        without = f"{share:.2f}" if seconds > 1.5 * started else ""
        rates = f"{weights / seconds / 1e6:.0f}", f"{copy / seconds:.2f}", without
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", *rates, f"{memory / 1e9:.2f}")
        if share < RATE_LIMIT and size != "0.1B":
            faults.append(f"{name}: slower than {RATE_LIMIT} of the copy")
        if memory > MEMORY_LIMIT:
            faults.append(f"{name}: more than {MEMORY_LIMIT / 1e9} GB")
    for copy, cpu in zip(copies, copies_cpu, strict=True):
        table.add_row("copy", f"{copy:.1f}", f"{cpu:.1f}", f"{weights / copy / 1e6:.0f}", "", "", "")
    table.add_row("start-up", f"{started:.1f}", f"{started_cpu:.1f}", "", "", "", "")
    Console().print(table)
    if not same(source, back):
        faults.append("the folder that came back is another")
    print("\n".join(faults) or "the folder that came back is the same, byte for byte")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
