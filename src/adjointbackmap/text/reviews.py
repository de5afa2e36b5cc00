"""The movie reviews: 10,662 sentences, half of them positive [Pang2005].

Nothing depends on the order of the sentences in the files. The fold of a sentence follows from the
SHA-256 of its text, and so does the tenth of the training part that chooses the epoch.
"""

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adjointbackmap.data import ENVIRONMENT_VARIABLE, MOST_CHARACTERS
from adjointbackmap.files.checked import shortened

NAME = "reviews"
CLASSES = ("negative", "positive")
FILES = ("rt-polarity.neg", "rt-polarity.pos")  # in the order of the classes
FOLDERS = ("movie-reviews", "rt-polaritydata", ".")  # where the files may be, inside of the root
FOLDS = 10
URL = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz"
# SHA-256 of the sentences of each file, stripped, sorted and joined by line feeds: it is the same
# for every copy, compressed or not, in UTF-8 or in Windows-1252.
SHA256 = {
    "rt-polarity.neg": "80ff81b4ebccedf43d6ab183fef16dff3a76213bac3072abcea3d22b23b17747",
    "rt-polarity.pos": "8fd1616add4b85ff9c05f1e93855f14a195830670be8b4a54bf21b1cf77cae31",
}


@dataclass(frozen=True)
class Sentences:
    """Sentences with labels.

    Attributes:
        texts: The sentences.
        labels: The class of each: 0 is negative, 1 positive.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def hashes(self) -> tuple[int, ...]:
        """SHA-256 of each sentence."""
        return tuple(int(hashlib.sha256(text.encode()).hexdigest(), 16) for text in self.texts)

    def fold(self, number: int) -> "Fold":
        """Split the sentences for one round of cross-validation.

        Args:
            number: Which tenth of the sentences is the test part, from 0 to 9.

        Raises:
            ValueError: If there is no such fold.
        """
        if not 0 <= number < FOLDS:
            msg = f"A fold must be from 0 to {FOLDS - 1}. Got {number}: name another."
            raise ValueError(msg)

        def chosen(belongs: Callable[[int], bool]) -> Sentences:
            kept = [i for i, value in enumerate(self.hashes) if belongs(value)]
            kept.sort(key=self.hashes.__getitem__)  # the same order for all copies of the data
            return Sentences(
                tuple(self.texts[i] for i in kept), tuple(self.labels[i] for i in kept)
            )

        # the last digit of the hash is the fold, the digit before chooses the validation part
        return Fold(
            chosen(lambda h: h % FOLDS != number and h // FOLDS % FOLDS != 0),
            chosen(lambda h: h % FOLDS != number and h // FOLDS % FOLDS == 0),
            chosen(lambda h: h % FOLDS == number),
        )


@dataclass(frozen=True)
class Fold:
    """The three parts of the sentences in one round of cross-validation.

    Attributes:
        train: What the weights and the vocabulary are made from.
        validation: A tenth of the other folds; it chooses the epoch.
        test: The fold itself; it chooses nothing.
    """

    train: Sentences
    validation: Sentences
    test: Sentences


def load(root: str | os.PathLike[str] | None = None) -> Sentences:
    """Load the movie reviews.

    Args:
        root: The folder of the two files, or the folder that it is in. The files may be compressed
            with gzip. The default is the environment variable ``ADJOINTBACKMAP_DATA``. Without
            both, the archive is downloaded once.

    Returns:
        All sentences, the negative ones first.

    Raises:
        FileNotFoundError: If ``root`` lacks the files.
        ConnectionError: If the archive cannot be downloaded.
        ValueError: If a file is damaged.
    """
    folder = _find(root or os.environ.get(ENVIRONMENT_VARIABLE))
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(FILES):
        found = _read(folder, name)
        texts += found
        labels += [label] * len(found)
    return Sentences(tuple(texts), tuple(labels))


def _find(root: str | os.PathLike[str] | None) -> Path:
    """The folder of the two files.

    Raises:
        FileNotFoundError: If ``root`` lacks them.
    """
    if not root:
        return _download()
    for folder in (Path(root) / name for name in FOLDERS):
        if all(_path(folder, name) for name in FILES):
            return folder
    msg = (
        f"{Path(root) / FOLDERS[0]} must hold {' and '.join(FILES)}, as they are or as .gz. "
        f"Got none: unpack {URL} there."
    )
    raise FileNotFoundError(msg)


def _path(folder: Path, name: str) -> Path | None:
    """The file of a name, compressed or not; ``None`` if there is none."""
    choices = (folder / name, folder / f"{name}.gz")
    return next((path for path in choices if path.is_file()), None)


def _download() -> Path:
    """The folder of the files in the cache; the archive is downloaded the first time.

    Raises:
        ConnectionError: If that fails.
    """
    import pooch

    unpack = pooch.Untar(extract_dir="rt-polaritydata")
    cache = pooch.os_cache("adjointbackmap")
    try:
        # no checksum of the archive: the sentences have one, which every copy is compared with
        members = pooch.retrieve(URL, None, "rt-polaritydata.tar.gz", cache, processor=unpack)
    except OSError as error:
        msg = (
            f"{URL} could not be downloaded ({shortened(error, MOST_CHARACTERS)}); "
            f"unpack a copy and name its folder with --data or {ENVIRONMENT_VARIABLE}."
        )
        raise ConnectionError(msg) from error
    return Path(next(m for m in members if m.endswith(FILES[0]))).parent


def _read(folder: Path, name: str) -> list[str]:
    """The sentences of one file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = _path(folder, name)
    assert path is not None  # `_find` has seen it
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        msg = f"{path} must be a gzip file. Got a damaged one ({error}): fetch it again."
        raise ValueError(msg) from error
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")  # as the archive has it
    sentences = [line.strip() for line in text.split("\n") if line.strip()]
    actual = hashlib.sha256("\n".join(sorted(sentences)).encode()).hexdigest()
    if actual != SHA256[name]:
        msg = (
            f"{path} must have the sentences of the data set, with SHA-256 {SHA256[name]}. "
            f"Got {len(sentences):,} with {actual}: fetch it again."
        )
        raise ValueError(msg)
    return sentences
