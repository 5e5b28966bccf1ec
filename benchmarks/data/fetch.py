"""Gets the images and weights behind the figures from their public sources, as the other benchmarks take them.

    python -m benchmarks.data.fetch --to ../shared/data [--only clothing,weights] [--from FOLDER]
    python -m benchmarks.data.fetch --check ../shared/data [--only clothing,weights]

--from takes them from a folder that has them already; --check compares a folder with benchmarks/data/data.json, whose
SHA-256 sums --record writes. An item appears whole and with the recorded sum, or not at all. With an item missing that
could be had, or that --only names, or with another content, the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.data.sources import ITEMS, Item

SUMS = Path(__file__).with_name("data.json")


class DataError(Exception):
    """What keeps an item from being had, in one sentence."""


def download(address: str, folder: Path) -> Path:
    """The file behind an address, or what pip has under a name, in the folder."""
    advice = "without a network, --from FOLDER takes what is prepared already"
    if address.startswith("pip:"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
        done = subprocess.run([*command, folder, address[4:]], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise DataError(f"pip cannot get {address[4:]} ({reason}); {advice}")
        return next(folder.glob("*.whl"))
    target = folder / address.rsplit("/", 1)[-1]
    try:
        with urllib.request.urlopen(address, timeout=60) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
        size = response.headers["Content-Length"]
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot get {address} ({getattr(error, 'reason', error)}); {advice}") from None
    if size is not None and int(size) != target.stat().st_size:  # copyfileobj takes a lost connection for the end
        raise DataError(f"{address} broke off after {target.stat().st_size} of {size} bytes: start again")
    return target


def parts(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder, or the one file, under the names that count in the sum."""
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if not file.is_dir()}
    yield from sorted(names.items()) if path.is_dir() else [("", path)]


def sum_of(path: Path) -> str:
    """SHA-256 over names and contents; of safetensors whatever the order of the header, which is left to chance."""
    digest = hashlib.sha256()
    for name, file in parts(path):
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            with suppress(ValueError):
                content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def recorded(path: str) -> dict[str, Any]:
    return dict(json.loads(SUMS.read_text()).get(path, {}))


def state(item: Item, folder: Path) -> str:
    """`ok`, `missing` or `differs`."""
    path = folder / item.path
    return "missing" if not path.exists() else "ok" if sum_of(path) == recorded(item.path)["sha256"] else "differs"


def make(item: Item, folder: Path, origin: Path | None) -> None:
    """Puts an item into the folder at once, when all of it is there and its sum is right."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
        made = Path(temporary) / item.path
        if origin:
            source = f"{origin / item.path}"
            for name, file in parts(origin / item.path):
                copy = made / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)  # without the permissions, since a folder may be read-only
        else:
            source = " and ".join(item.addresses)
            downloads = Path(temporary) / "downloads"
            downloads.mkdir()
            sources = [download(address, downloads) for address in item.addresses]
            try:
                assert item.prepare
                if tensors := item.prepare(sources, made):
                    write_weights(tensors, made, recorded(item.path)["metadata"])
            except Exception as error:  # whatever a damaged archive or another version of a library leads to
                raise DataError(f"{item.name} cannot be made from {source}: {type(error).__name__}, {error}") from None
        if state(item, Path(temporary)) != "ok":
            raise DataError(f"what {source} gives is not the {item.name} of the figures (benchmarks/data/data.json)")
        (folder / item.path).parent.mkdir(exist_ok=True)
        made.rename(folder / item.path)


def write_weights(tensors: dict[str, Any], target: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    target.parent.mkdir()
    target.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def get(item: Item, folder: Path, origin: Path | None) -> str:
    """Makes what is missing, and says what is there then."""
    found = state(item, folder)
    if found == "differs":
        raise DataError(f"{folder / item.path} is not the {item.name} of the figures, and is left alone: move it away")
    if found == "ok":
        return "ok"
    if origin and not (origin / item.path).exists():
        raise DataError(f"{origin} has no {item.path}")
    if not (item.prepare or origin):
        return "missing"
    print(f"{item.path}: {item.licence}, from {origin or ' and '.join(item.addresses)}", flush=True)
    make(item, folder, origin)
    return "ok"


def record(items: list[Item], folder: Path) -> None:
    """Writes the sums, and the metadata of weights, which go into the file that is made anew."""
    from safetensors import safe_open

    sums = json.loads(SUMS.read_text()) if SUMS.exists() else {}
    for item in items:
        sums[item.path] = {"sha256": sum_of(folder / item.path)}
        if item.path.endswith(".safetensors"):
            with safe_open(folder / item.path, "pt") as opened:
                sums[item.path]["metadata"] = dict(sorted(opened.metadata().items()))
    ordered = {item.path: sums[item.path] for item in ITEMS if item.path in sums}
    SUMS.write_text(json.dumps(ordered, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--to", type=Path, help="put what is missing into this folder")
    action.add_argument("--check", type=Path, help="say of each item in this folder: ok, missing or differs")
    action.add_argument("--record", type=Path, help="write the sums of this folder to benchmarks/data/data.json")
    parser.add_argument("--only", help=f"weights, or names: {', '.join(item.name for item in ITEMS)}")
    parser.add_argument("--from", dest="origin", type=Path, help="a folder as --to makes it, in the place of a network")
    options = parser.parse_args(arguments)
    if options.origin and not options.to:
        parser.error("--from goes with --to")
    only = set(options.only.split(",")) if options.only else set()
    items = [item for item in ITEMS if not only or only & {item.name, item.path.split("/")[0]}]
    if unknown := only - {"weights"} - {item.name for item in items}:
        parser.error(f"--only has {', '.join(sorted(unknown))}, which is none of {', '.join(i.name for i in ITEMS)}")
    failed, was_there = False, options.to is None or options.to.exists()
    try:
        if options.record:
            record(items, options.record)
        for item in items if not options.record else []:
            found = state(item, options.check) if options.check else get(item, options.to, options.origin)
            reason = f": cannot be made from its source, since {item.lost}; --from FOLDER takes it" if item.lost else ""
            print(f"{item.path} {found}{reason if found == 'missing' else ''}", flush=True)
            failed |= found == "differs" or (found == "missing" and (bool(only) or not item.lost))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; what was begun is not there, and the same command goes on", file=sys.stderr)
        return 130
    finally:
        if not was_there:
            with suppress(OSError):  # something could be had
                options.to.rmdir()
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is unfinished is removed
    raise SystemExit(main())
