"""Does in a chroot what a Dockerfile says: here is no Docker daemon, and what an image's lines do is to be tried.

    python tools/image_chroot.py DOCKERFILE BASE FOLDER [NAME=VALUE...]      (root; in the project's root)

BASE is a root file system (`debootstrap`), which stands for every image that FROM names; FOLDER gets one a stage, the
last one as the image. NAME=VALUE are build arguments. RUN sees the network, as it does in a build; the chroot's mounts
end with it. Instructions that are not known here, and options of theirs, are an error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

KNOWN = frozenset(
    {"ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "RUN", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)
# "$1" the root, "$2" the folder, "$3" user:group, "$4" the command; what is mounted goes with the namespace.
_INSIDE = """\
mount --make-rprivate / && mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" || exit 125
for pair in $BINDS; do
    mkdir -p "$1${pair#*=}" && mount --bind "${pair%%=*}" "$1${pair#*=}" || exit 125
done
unset BINDS
exec chroot --userspec="$3" "$1" /bin/sh -c 'cd "$0" && eval "$1"' "$2" "$4"
"""
_CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # of a machine whose registries have their own


class ImageError(Exception):
    """What a Dockerfile says cannot be done; the message says which line."""


class Instruction(NamedTuple):
    """One instruction of a Dockerfile: its name in capitals, and what follows."""

    name: str
    rest: str


@dataclass
class Stage:
    """What follows one FROM."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Image:
    """A root file system with what its Dockerfile says of it."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    user: str = "0:0"
    folder: str = "/"


def parsed(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their values, and the stages. Raises ImageError."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        if not name:
            continue
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stages.append(Stage(base, alias))
        elif stages and name in KNOWN:
            stages[-1].instructions.append(Instruction(name, rest.strip()))
        elif name == "ARG" and not stages:
            argument, _, value = rest.partition("=")
            arguments[argument] = value
        else:
            raise ImageError(f"{line.strip()}: no instruction that is known here")
    return arguments, stages


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with each ${NAME} replaced. Raises ImageError for one without a value."""

    def value(match: re.Match[str]) -> str:
        if not values.get(match[1]):
            raise ImageError(f"{text}: {match[1]} has no value")
        return values[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def pairs(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """What LABEL and ENV say."""
    return {name: value for name, _, value in (word.partition("=") for word in shlex.split(filled(text, values)))}


class Ignored:
    """What a .dockerignore leaves out of the context: the last pattern that fits decides."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._patterns = [(line.lstrip("!"), not line.startswith("!")) for line in lines if line and line[0] != "#"]

    def __call__(self, path: str) -> bool:
        found = False
        for pattern, out in self._patterns:
            expression = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{expression}(?:/.*)?", path):
                found = out
        return found

    def may_hold(self, folder: str) -> bool:
        """Whether something below this folder may be in the context."""
        return not self(folder) or any(not out and name.startswith(f"{folder}/") for name, out in self._patterns)


def context_files(context: Path, ignored: Ignored) -> Iterator[str]:
    """The paths of the context's files, relative to it."""
    for folder, folders, files in os.walk(context):
        place = os.path.relpath(folder, context)
        here = "" if place == "." else f"{place}/"
        folders[:] = [name for name in folders if ignored.may_hold(here + name)]
        yield from (here + name for name in files if not ignored(here + name))


class Builder:
    """Builds the stages of one Dockerfile, each in a copy of the file system that its FROM names."""

    def __init__(self, dockerfile: Path, context: Path, place: Path, arguments: Mapping[str, str]) -> None:
        self.context, self.place, self.given = context, place, dict(arguments)
        self.defaults, self.stages = parsed(dockerfile.read_text())
        ignore = dockerfile.with_name(dockerfile.name + ".dockerignore")
        self.files = sorted(context_files(context, Ignored(ignore.read_text() if ignore.exists() else "")))
        self.images: dict[str, Image] = {}

    def build(self, bases: Mapping[str, Path], binds: Mapping[Path, str] | None = None) -> Image:
        """The last stage's image. `bases` are file systems by the names that FROM has, and "" any other; `binds` are
        folders of this machine that RUN sees at a path. Raises ImageError."""
        values = {**self.defaults, **{name: self.given[name] for name in self.defaults if name in self.given}}
        for number, stage in enumerate(self.stages):
            base = filled(stage.base, values)
            source = self.images[base].root if base in self.images else bases.get(base, bases.get(""))
            if source is None:
                raise ImageError(f"FROM {base}: there is no file system for it")
            root = self.place / (stage.name or f"stage-{number}")
            subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(root)], check=True)
            self.images[stage.name or str(number)] = image = Image(root)
            self._fill(image, stage, values, binds or {})
        return image

    def _fill(self, image: Image, stage: Stage, outer: Mapping[str, str], binds: Mapping[Path, str]) -> None:
        arguments: dict[str, str] = {}
        for name, rest in stage.instructions:
            values = {**arguments, **image.environ}
            if name == "ARG":
                argument, _, default = rest.partition("=")
                arguments[argument] = self.given.get(argument, default or outer.get(argument, ""))
            elif name == "ENV":
                image.environ.update(pairs(rest, values))
            elif name == "LABEL":
                image.labels.update(pairs(rest, values))
            elif name == "USER":
                image.user = rest if ":" in rest else f"{rest}:0"
            elif name == "WORKDIR":
                image.folder = rest
                (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif name == "VOLUME":
                image.volumes += re.findall(r'"([^"]+)"', rest)
            elif name == "ENTRYPOINT":
                image.entrypoint = re.findall(r'"([^"]+)"', rest)
            elif name == "COPY":
                self._copy(image, filled(rest, values))
            elif name == "RUN":
                self._run(image, rest, values, binds)

    def _run(self, image: Image, command: str, environ: Mapping[str, str], binds: Mapping[Path, str]) -> None:
        seen = {str(source): at for source, at in binds.items()}
        resolver = image.root / "etc/resolv.conf"
        resolver.unlink(missing_ok=True)
        shutil.copy("/etc/resolv.conf", resolver)
        certificates = {name: os.environ[name] for name in _CERTIFICATES if name in os.environ}
        for path in set(certificates.values()):
            seen[str(Path(path).parent)] = "/run/certificates"
        inside = {name: f"/run/certificates/{Path(path).name}" for name, path in certificates.items()}
        plain = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        made = {**plain, **inside, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LC_ALL": "C.UTF-8", **environ}
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _INSIDE, "inside"]
        words += [str(image.root), image.folder, image.user, command]
        bound = " ".join(f"{source}={at}" for source, at in seen.items())
        done = subprocess.run(
            words,
            env={**made, "BINDS": bound},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ImageError(f"RUN {command}\nended with {done.returncode}:\n{done.stdout[-4000:]}")

    def _copy(self, image: Image, rest: str) -> None:
        words = rest.split()
        source = ""
        if words[0].startswith("--from="):
            source = words.pop(0).removeprefix("--from=")
        if words[0].startswith("--"):
            raise ImageError(f"COPY {rest}: {words[0]} is not known here")
        *wanted, target = words
        into = target.endswith(("/", ".")) or len(wanted) > 1
        place = image.root / (target if target.startswith("/") else f"{image.folder}/{target}").lstrip("/")
        for one in wanted:
            if source:
                _copy_out(self.images[source].root / one.lstrip("/"), place)
            else:
                self._copy_context(one, place, into)

    def _copy_context(self, wanted: str, place: Path, into: bool) -> None:
        """A folder's content, or a file."""
        below = "" if wanted == "." else f"{wanted.rstrip('/')}/"
        found = [path for path in self.files if path == wanted or path.startswith(below)]
        if not found:
            raise ImageError(f"COPY {wanted}: it is not in the context")
        for path in found:
            relative = Path(path).name if path == wanted else path.removeprefix(below)
            copy = place / relative if into or path != wanted else place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.context / path, copy, follow_symlinks=False)


def _copy_out(source: Path, place: Path) -> None:
    """A folder's content, or a file, of another stage."""
    place.parent.mkdir(parents=True, exist_ok=True)
    words = ["cp", "-a", f"{source}/." if source.is_dir() else str(source), str(place)]
    if source.is_dir():
        place.mkdir(exist_ok=True)
    subprocess.run(words, check=True)


def debian(folder: Path, suite: str = "bookworm", kept: Path | None = None) -> Path:
    """A root file system of Debian by debootstrap, with this machine's package sources.

    It is packed into `kept` (a .tar), and comes from there the next time. Raises ImageError.
    """
    if kept is not None and kept.exists():
        folder.mkdir()
        subprocess.run(["tar", "-C", str(folder), "-xpf", str(kept)], check=True)
        return folder
    _debootstrap(folder, suite)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        subprocess.run(["tar", "-C", str(folder), "-cpf", str(part), "."], check=True)
        part.replace(kept)
    return folder


def _debootstrap(folder: Path, suite: str) -> None:
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        words = ["debootstrap", "--variant=minbase", suite, str(folder)]
        made = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False)
    if made.returncode:
        raise ImageError(f"debootstrap ended with {made.returncode}:\n{log.read_text()[-4000:]}")
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if sources.exists() and f"VERSION_CODENAME={suite}\n" in Path("/etc/os-release").read_text():
        (folder / "etc/apt/sources.list").unlink(missing_ok=True)
        shutil.copy(sources, folder / "etc/apt/sources.list.d/debian.sources")


def main(words: Sequence[str]) -> None:
    dockerfile, base, folder, *arguments = words
    given = {name: value for name, _, value in (word.partition("=") for word in arguments)}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    try:
        image = Builder(Path(dockerfile), Path.cwd(), place, given).build({"": Path(base)})
    except ImageError as error:
        sys.exit(f"image_chroot: {error}")
    print(image.root)


if __name__ == "__main__":
    main(sys.argv[1:])
