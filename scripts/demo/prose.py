"""Public-domain English prose from packages of ordinary registries: Jane Austen's six novels
(Debian r-cran-janeaustenr) and the World English Bible (Debian sword-text-web). Reads the
packages as downloaded and gives passages; nothing is installed."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

COMMANDS = "apt-get download sword-text-web r-cran-janeaustenr"


def read_packages(folder: Path) -> list[str]:
    """The books as lists of paragraphs, from the two .deb files in `folder`.

    Raises:
        FileNotFoundError: a package is not there.
    """
    paragraphs: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for pattern in ("sword-text-web_*.deb", "r-cran-janeaustenr_*.deb"):
            found = sorted(folder.glob(pattern))
            if not found:
                raise FileNotFoundError(f"No {pattern} in {folder}; get it with: {COMMANDS}")
            subprocess.run(["dpkg-deb", "-x", str(found[-1]), scratch], check=True)
        paragraphs += _bible(Path(scratch) / "usr/share/sword/modules/texts/ztext/engWEB2015eb")
        paragraphs += _austen(Path(scratch) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    return paragraphs


def _bible(folder: Path) -> list[str]:
    """SWORD's zText: an index of (offset, size, full size); blocks are zlib streams of OSIS XML."""
    blocks = []
    for part in ("ot", "nt"):
        index, data = (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                xml = zlib.decompress(data[offset : offset + size]).decode("utf-8", "ignore")
                xml = re.sub(r"<note.*?</note>|<title.*?</title>", "", xml, flags=re.S)
                blocks.append(_clean(re.sub(r"<[^>]+>", "", xml)))
    return blocks


def _austen(file: Path) -> list[str]:
    """R's lazy-load data: big-endian length and a zlib stream per object; its strings are lines."""
    raw, at, paragraphs = file.read_bytes(), 0, []
    while at < len(raw) - 4:
        stream = zlib.decompressobj()
        blob = stream.decompress(raw[at + 4 :])
        at = len(raw) - len(stream.unused_data)
        lines = [
            blob[m.end() : m.end() + struct.unpack(">I", m.group(1))[0]].decode("utf-8", "ignore")
            for m in re.finditer(rb"\x00..\x09(\x00\x00..)", blob, flags=re.S)
        ]
        paragraphs += [_clean(p) for p in re.split(r"\n\s*\n", "\n".join(lines))]
    return [p for p in paragraphs if len(p) > 80 and not p.isupper()]


def _clean(text: str) -> str:
    """One line, ASCII quotes and dashes."""
    for curly, plain in {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-"}.items():
        text = text.replace(curly, plain)
    return re.sub(r"\s+", " ", text).strip()


def passages(paragraphs: list[str], seed: int) -> list[str]:
    """Runs of whole sentences, of 300 to 2500 characters each."""
    rng = random.Random(seed)
    found: list[str] = []
    current, wanted = "", rng.randint(300, 2500)
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"])", paragraph):
            current += (" " if current else "") + sentence
            if len(current) >= wanted:
                found.append(current[:4000])
                current, wanted = "", rng.randint(300, 2500)
    return found
