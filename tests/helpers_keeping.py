"""What tests of the checkpoints in a folder share."""

import hashlib

from util.checkpoint import read_sums


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*.pth"))


def sums_are_right(folder):
    """What `sha256sum -c` says, about all checkpoints in the folder."""
    digests = {name: digest for digest, name in read_sums(folder)}
    assert len(digests) == len(read_sums(folder)) and sorted(digests) == names(folder)
    return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digests[name] for name in digests)
