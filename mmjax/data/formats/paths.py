"""Names that strangers wrote, as files of one folder: whatever points elsewhere is refused, and nothing is fetched."""

import os
import re
import stat
from pathlib import Path

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown

LONGEST = 4096  # characters of a name
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|file:|[A-Za-z]:[\\/]|\\\\|//", re.IGNORECASE)


class Missing(InputError):
    """There is no such file, or it lies where nothing is fetched from."""


def is_address(name: str) -> bool:
    """Whether a name says where in a network, or on which drive, something lies."""
    return bool(ADDRESS.match(name))


def inside(root: Path, name: str) -> Path:
    """The file that a name means in a folder, links followed; nothing is opened, and it need not exist.

    Args:
      root: an absolute path without links (`Path.resolve`).

    Raises:
      InputError: the name is empty, absolute, an address, goes up, or leads out of the folder through a link.
    """
    if is_address(name):
        raise InputError(f"{shown(name)} is an address, and nothing is fetched; download it and give its relative path")
    if not name or len(name) > LONGEST or "\0" in name or not is_text(name):
        raise InputError(f"{shown(name)} is no name of a file; give a relative path of at most {LONGEST} characters")
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{shown(name)} leads out of {root}; give a path relative to that folder, without '..'")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root):
        raise InputError(f"{shown(name)} leads out of {root} through a link; copy the file to where the link is")
    return path


def is_text(name: str) -> bool:
    """Whether a name is Unicode, and not bytes that Python could not read as such."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_regular(path: Path) -> os.stat_result:
    """What the file system says of a file; never opens it, for opening a pipe blocks and a device may do anything.

    Raises:
      Missing: there is no such file.
      InputError: it is a folder, link, pipe, socket or device, or may not be looked at.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(
            f"there is no file {str(path)!r}; check the name, or give the folder it lies in as root"
        ) from None
    except OSError as error:
        raise InputError(f"{shown(str(path))} cannot be read ({error.strerror}); check the name") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{str(path)!r} is not a regular file; replace it by one, or take it out of the dataset")
    return found


def open_regular(path: Path) -> int:
    """A file descriptor for reading a regular file; the path has no links, and none put there since is followed.

    Raises:
      InputError: as `require_regular`.
    """
    require_regular(path)
    try:
        # Between the look and this a pipe may have taken the file's place: then neither wait nor read.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be opened ({error.strerror}); check its permissions") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{str(path)!r} is not a regular file; replace it by one, or take it out of the dataset")
    return fd
