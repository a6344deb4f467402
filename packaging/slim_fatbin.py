"""Zeroes in a library what a card of one compute capability does not run, so that it packs into a fraction of its size.

    python packaging/slim_fatbin.py SOURCE TARGET CAPABILITY [--without_ptx]     (90 for H100 and H200)

The library keeps its layout: only machine code for other cards, and PTX wherever there is machine code for this one, become
zeros; without PTX, the rest of that too: kernels that have no machine code for this card cannot run then.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path


FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")
"""Magic, version, size of the header, size of the entries."""

ENTRY_HEADER = struct.Struct("<HHIQ")
"""Kind, version, size of the header, size of the code."""

ARCH_OFFSET = 28
PTX, ELF = 1, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("capability", type=int)
    parser.add_argument("--without_ptx", action="store_true")
    args = parser.parse_args()
    source, capability = args.source, args.capability
    data = bytearray(source.read_bytes())
    for start, end in sections(source):
        for entries in fatbins(data, start, end):
            has_code = any((kind, arch) == (ELF, capability) for kind, arch, _, _ in entries)
            for kind, arch, position, size in entries:
                is_needed_ptx = kind == PTX and arch <= capability and not has_code and not args.without_ptx
                if (kind, arch) != (ELF, capability) and not is_needed_ptx:
                    data[position : position + size] = bytes(size)
    args.target.write_bytes(data)


def sections(library: Path) -> Iterator[tuple[int, int]]:
    """Start and end in the file of what holds code for cards."""
    listed = subprocess.run(["readelf", "-S", "-W", library], capture_output=True, text=True, check=True).stdout
    for found in re.finditer(r"nv_\w*fatbin\s+PROGBITS\s+\w+\s+(\w+)\s+(\w+)", listed):
        start, size = (int(number, 16) for number in found.groups())
        yield start, start + size


def fatbins(data: bytearray, position: int, end: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Of each collection of one program for several cards: kind, capability, position and size of every entry."""
    while position < end:
        magic, _, header_size, size = FATBIN_HEADER.unpack_from(data, position)
        if magic != FATBIN_MAGIC:
            # Collections are aligned.
            position += 8
            continue
        entries, at, stop = [], position + header_size, position + header_size + size
        while at < stop:
            kind, _, entry_header_size, code_size = ENTRY_HEADER.unpack_from(data, at)
            (arch,) = struct.unpack_from("<I", data, at + ARCH_OFFSET)
            entries.append((kind, arch, at + entry_header_size, code_size))
            at += entry_header_size + code_size
        yield entries
        position = stop


if __name__ == "__main__":
    main()
