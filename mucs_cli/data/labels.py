"""Class labels from names: which classes there are, how they are numbered, and which one an image has."""

from collections.abc import Iterable, Sequence

import numpy as np

from mucs_cli.errors import UserError

MAX_DIGITS = 4000


def number_classes(
    values: Sequence[str], num_classes: int | None, key: str, others: Iterable[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """Labels and class names from one non-empty string an image.

    Whole numbers are sorted as numbers, so that 0..K-1 are kept as they are; other names by their text. With
    ``num_classes``, the values are whole numbers below it, and classes that no image has count as well.

    Args:
        values: N class names.
        num_classes: how many classes there are; None: as many as there are distinct values.
        key: the configuration key that an error names.
        others: names that are classes too, of images that are left out: a part is numbered as the whole is.
    Returns:
        int64 [N] in 0..K-1, and the K class names.
    Raises:
        UserError: with ``num_classes``, a value that is no whole number below it.
    """
    distinct = set(values) if num_classes is not None else {*values, *others}
    whole = all(is_whole(value) for value in distinct)
    if num_classes is None:
        names = sorted(distinct, key=int) if whole else sorted(distinct)
    else:
        wrong = sorted(value for value in distinct if not is_whole(value) or int(value) >= num_classes)
        if wrong:
            raise UserError(
                key,
                f"got {num_classes}; a label is {wrong[0]!r}, expected whole numbers from 0 to {num_classes - 1}. "
                f"Correct the labels or {key}, or leave it null.",
            )
        names = [str(index) for index in range(num_classes)]
    number = {name: index for index, name in enumerate(names)}
    return np.array([number[value] for value in values], dtype=np.int64), names


def is_number(text: str) -> bool:
    """Whether a text is a whole number that Python reads: it refuses more than 4,300 digits."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def is_whole(text: str) -> bool:
    return is_number(text) and str(int(text)) == text


def label_of(text: str, class_names: Sequence[str], place: str) -> int:
    """The label that a text means among the classes of a data set: a class's name, or else its number.

    Raises:
        UserError: there is no such class.
    """
    if text in class_names:
        return class_names.index(text)
    if is_whole(text) and int(text) < len(class_names):
        return int(text)
    some = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
    raise UserError(
        place, f"got class {text!r}; expected one of the training data's {len(class_names)} ({some}). Correct it."
    )
