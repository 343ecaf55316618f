"""``data=huggingface``: what the ``datasets`` library reads, from local disk or from the hub.

The library is imported when a data set is opened, which happens once a run; later stages use the run's own cache. No
script of a data set is run (the library has not known them since version 4) and nothing pickled is read.
"""

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.captions import CaptionEncoder, encoder_state
from mucs_cli.data.decode import SUFFIXES
from mucs_cli.data.labels import number_classes
from mucs_cli.data.metadata import RESERVED, as_text
from mucs_cli.data.pictures import PictureSource
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.files import user_path
from mucs_cli.schemas import HuggingFaceConfig

BUILDERS = ("parquet", "arrow", "imagefolder", "webdataset")
"""Kinds of data set on the hub that are read; all of them are data, none is code."""


class HuggingFaceSource(PictureSource):
    """The rows of one split, in their order; row i is called ``<split>[i]``.

    Raises:
        UserError: the path is neither a data set on disk nor a name on the hub.
    """

    def __init__(self, config: HuggingFaceConfig):
        super().__init__(config)
        self.config = config
        local = Path(os.path.abspath(user_path(config.path)))
        self.folder = local if local.exists() else None
        if self.folder is None and (config.path.startswith((".", "/", "~")) or config.path.count("/") > 1):
            raise UserError("data.path", f"got {config.path}: nothing there; expected a data set. Correct it.")
        where = list_files(local) if local.exists() else [config.path, config.subset, config.revision]
        self.condition_state = encoder_state(config.text_encoder) if config.text_encoder else ""
        self.state = fingerprint(where, config.split, self.condition_state)
        name = local.name if self.folder else config.path
        self.facts = {
            "name": f"{config.split} split of {name}",
            "source": str(self.folder or f"https://huggingface.co/datasets/{config.path}"),
            "licence": "not stated",
            "citation": "not stated",
        }

    def open(self, scratch: Path) -> None:
        library = import_datasets()
        dataset = self._load(library, scratch)
        features = dataset.features
        image_column = self._image_column(features)
        self.dataset = as_pictures(dataset.select_columns([image_column]), image_column, library)
        self.image_column = image_column
        num_images = min(len(dataset), self.config.limit or len(dataset))
        if num_images == 0:
            raise UserError("data.split", f"got {self.config.split}, which has no rows. Choose another split.")
        self.rows = list(range(num_images))
        self.files = [f"{self.config.split}[{row}]" for row in self.rows]
        table = dataset.select(self.rows)
        self.metadata = {**self._file_names(num_images), **self._read_metadata(table, image_column)}
        self.class_names = []
        self._read_labels(table, library)
        if self.config.text_encoder:
            self._prepare_captions(table)
        info = dataset.info
        self.facts["licence"] = info.license or self.facts["licence"]
        self.facts["citation"] = " ".join(info.citation.split()) or self.facts["citation"]

    # --- opening -----------------------------------------------------------------------------------------------------

    def _load(self, library: Any, scratch: Path) -> Any:
        """The split as a ``datasets.Dataset``; copies that the library makes of local files go to ``scratch``."""
        try:
            if self.folder is None:
                return self._load_from_hub(library)
            return self._load_local(library, self.folder, scratch)
        except UserError:
            raise
        except Exception as error:  # the library raises whatever its file systems, parsers and servers raise
            text = str(error).strip().split("\n")[0]
            raise UserError(
                "data.path", f"got {self.config.path}, which cannot be opened as a data set ({text}). Correct it."
            ) from error

    def _load_from_hub(self, library: Any) -> Any:
        name, subset, revision = self.config.path, self.config.subset, self.config.revision
        builder = library.load_dataset_builder(name, subset, revision=revision)
        kind = type(builder).__module__.split(".")[-1]
        if kind not in BUILDERS:
            raise UserError(
                "data.path", f"got {name}, of kind {kind}; expected {', '.join(BUILDERS)}. Save it as parquet first."
            )
        return self._split_of(library.load_dataset(name, subset, revision=revision))

    def _load_local(self, library: Any, path: Path, scratch: Path) -> Any:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return self._split_of(library.load_from_disk(str(path)))
        if path.is_file():
            files, kind = [path], path.suffix[1:].lower()
        else:
            files, kind = data_files(path, self.config.split)
        if kind == "arrow":
            return library.concatenate_datasets([library.Dataset.from_file(str(file)) for file in files])
        if kind == "parquet":
            names = [str(file) for file in files]
            return library.load_dataset("parquet", data_files=names, split="train", cache_dir=str(scratch))
        if kind == "imagefolder":
            return self._split_of(library.load_dataset("imagefolder", data_dir=str(path), cache_dir=str(scratch)))
        raise UserError(
            "data.path",
            f"got {path}; expected a save_to_disk folder, parquet or arrow files, or a folder of pictures. "
            "Nothing else is read (pickled files never are): save it as parquet first.",
        )

    def _split_of(self, loaded: Any) -> Any:
        if not isinstance(loaded, dict):
            return loaded
        if self.config.split not in loaded:
            raise UserError(
                "data.split",
                f"got {self.config.split}; {self.config.path} has {', '.join(map(str, loaded))}."
                f"{did_you_mean(self.config.split, map(str, loaded))} Choose one of them.",
            )
        return loaded[self.config.split]

    # --- columns -----------------------------------------------------------------------------------------------------

    def _image_column(self, features: Any) -> str:
        if self.config.image_column is not None:
            return self._checked(self.config.image_column, "data.image_column", features)
        found = [name for name, feature in features.items() if is_image(feature)]
        if len(found) != 1:
            raise UserError(
                "data.image_column",
                f"got null, and {len(found)} of the columns {', '.join(features)} hold images "
                f"({', '.join(found) or 'none'}); expected one. Set it to the column of the images.",
            )
        return found[0]

    def _checked(self, name: str, key: str, features: Any) -> str:
        if name not in features:
            raise UserError(
                key, f"got {name}; the data set has {', '.join(features)}.{did_you_mean(name, features)} Set it to one."
            )
        return name

    def _read_metadata(self, table: Any, image_column: str) -> dict[str, list[str]]:
        wanted = self.config.metadata_columns
        if wanted is None:
            names = [name for name, feature in table.features.items() if is_plain(feature)]
        else:
            names = [self._checked(name, "data.metadata_columns", table.features) for name in wanted]
        if self.config.caption_column is not None:
            self._checked(self.config.caption_column, "data.caption_column", table.features)
        columns = {}
        for name in names:
            if name == image_column:
                continue
            feature, values = table.features[name], table[name][:]
            to_name = class_name_of(feature)
            self._check_classes(name, feature, values)
            columns[f"metadata_{name}" if name in RESERVED else name] = [
                as_text(to_name(value) if to_name else value) for value in values
            ]
        return columns

    def _file_names(self, num_images: int) -> dict[str, list[str]]:
        """The metadata column ``file_name``, where every row has the name of its picture; no column otherwise."""
        chunks = self.dataset.data.column(self.image_column).chunks
        paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()][:num_images]
        if not all(paths):
            return {}
        root = f"{self.folder}/"
        return {"file_name": [path.removeprefix(root) if path.startswith(root) else Path(path).name for path in paths]}

    def _read_labels(self, table: Any, library: Any) -> None:
        column = self.config.label_column
        if column is None:
            found = [name for name, feature in table.features.items() if isinstance(feature, library.ClassLabel)]
            if len(found) > 1:
                raise UserError(
                    "data.label_column", f"got null; {', '.join(found)} hold classes. Set it to the one to use."
                )
            if not found:
                return
            column = found[0]
        self._checked(column, "data.label_column", table.features)
        feature, values = table.features[column], table[column][:]
        missing = [row for row, value in enumerate(values) if value is None or value == -1 or value == ""]
        if missing and self.config.label_column is None:
            return  # a split published without its labels
        if missing:
            raise UserError(
                self.files[missing[0]], f"got no class in column {column}; expected one. Leave data.label_column null."
            )
        self._check_classes(column, feature, values)
        if class_name_of(feature) is not None:
            names = list(feature.names)
            texts = [names[value] for value in values]
            self.label, self.class_names = np.array(values, dtype=np.int64), names
        else:
            if not all(isinstance(value, int | str) for value in values):
                raise UserError(
                    "data.label_column", f"got {column}, of {feature}; expected whole numbers or names. Choose another."
                )
            texts = [as_text(value) for value in values]
            self.label, self.class_names = number_classes(texts, self.config.num_classes, "data.num_classes")
        self.label_column = f"metadata_{column}" if column in RESERVED else column
        self.metadata = {self.label_column: texts, **{k: v for k, v in self.metadata.items() if k != self.label_column}}

    def _check_classes(self, column: str, feature: Any, values: Sequence[Any]) -> None:
        """Refuses numbers of classes that there are not; -1, as usual, is none."""
        if class_name_of(feature) is None:
            return
        for row, value in enumerate(values):
            if value is not None and not -1 <= value < len(feature.names):
                raise UserError(
                    self.files[row],
                    f"got class {value} in column {column}; expected 0 to {len(feature.names) - 1}. Correct the row.",
                )

    def _prepare_captions(self, table: Any) -> None:
        column = self.config.caption_column
        if column is None:
            raise UserError(
                "data.caption_column", "got null with data.text_encoder; expected the column of the captions. Set it."
            )
        self.captions = [
            captions_of(value, file, column) for value, file in zip(table[column][:], self.files, strict=True)
        ]
        assert self.config.text_encoder is not None
        self.encoder = CaptionEncoder(self.config.text_encoder)
        self.condition_shape = (self.config.captions_per_image, self.encoder.condition_dim)

    # --- rows --------------------------------------------------------------------------------------------------------

    def content(self, row: int) -> Path | bytes:
        image = self.dataset[row][self.image_column]
        if image is not None and image["bytes"] is not None:
            return image["bytes"]
        path = Path(image["path"]) if image is not None and image["path"] else None
        if path is None or not path.is_file():
            raise UserError(f"{self.config.path}, row {row}", "got no image. Remove the row.")
        places = hub_caches() if self.folder is None else [self.folder]
        if not any(path.resolve().is_relative_to(place.resolve()) for place in places):
            raise UserError(
                f"{self.config.path}, row {row}", f"got {path}, which is not in the data set. Correct the row."
            )
        return path

    def name(self, file: str) -> str:
        return f"{self.config.path}, {file}"

    def read_conditions(self, start: int, stop: int) -> np.ndarray:
        """The captions' vectors; an image with fewer captions than vectors repeats them in turn."""
        count = self.config.captions_per_image
        chosen = [self.captions[row] for row in self.rows[start:stop]]
        texts = [captions[index % len(captions)] for captions in chosen for index in range(count)]
        return self.encoder.encode(texts).reshape(len(chosen), count, -1)


# --- helpers ---------------------------------------------------------------------------------------------------------


def import_datasets() -> Any:
    """Raises UserError where the library is missing, or so old that it would run a data set's script."""
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise UserError(
            "data", "got huggingface; the datasets library is not installed. Run: pip install 'mucs[datasets]'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(
            "data", f"got datasets {datasets.__version__}; expected 4 or later. Run: pip install 'mucs[datasets]'"
        )
    datasets.disable_progress_bars()
    return datasets


def as_pictures(dataset: Any, column: str, library: Any) -> Any:
    """The data set with the column as encoded pictures, which are not decoded here.

    Raises:
        UserError: the column holds something else.
    """
    try:
        return dataset.cast_column(column, library.Image(decode=False))
    except Exception as error:  # Arrow raises whatever the column's type makes it meet
        raise UserError(
            "data.image_column", f"got {column}, of {dataset.features[column]}; expected pictures. Set it to another."
        ) from error


def hub_caches() -> list[Path]:
    """Where the libraries put files of data sets on the hub: a row of one may name no other file of this machine."""
    config, constants = import_module("datasets.config"), import_module("huggingface_hub.constants")
    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    return [Path(place) for place in (*(getattr(config, name) for name in names), constants.HF_HUB_CACHE)]


def list_files(path: Path) -> list[list[Any]]:
    """[relative POSIX path, size in bytes, modification time in ns] of every visible file below ``path``, sorted."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = []
    for file in files:
        relative = file.relative_to(path).as_posix()
        if not any(part.startswith(".") for part in Path(relative).parts) or file == path:
            status = file.stat()
            found.append([relative, status.st_size, status.st_mtime_ns])
    return sorted(found)


def data_files(folder: Path, split: str) -> tuple[list[Path], str]:
    """A folder's parquet or arrow files, sorted, and their kind; ``imagefolder`` where it holds pictures.

    Where names have the split in them (``train-00000-of-00002.parquet``, ``train/0.parquet``), only those of the split
    count.

    Raises:
        UserError: none of the named files is of the split.
    """
    for kind in ("parquet", "arrow"):
        files = sorted(file for file in folder.rglob(f"*.{kind}") if not file.name.startswith("."))
        if not files:
            continue
        splits = {file: split_in(file.relative_to(folder)) for file in files}
        named = {name for name in splits.values() if name}
        if named and split not in named:
            raise UserError("data.split", f"got {split}; {folder} has {', '.join(sorted(named))}. Choose one of them.")
        return [file for file in files if not named or splits[file] == split], kind
    if any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*")):
        return [], "imagefolder"
    return [], "none"


def split_in(path: Path) -> str | None:
    """The split that a file's relative path names, by the hub's conventions; None where it names none."""
    for part in (*path.parts[:-1], path.name.split("-")[0].split(".")[0]):
        if part in ("train", "test", "validation", "val", "dev"):
            return part
    return None


def is_image(feature: Any) -> bool:
    """An Image feature, or how one looks in a file without the library's own header: a struct of bytes and path."""
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def is_plain(feature: Any) -> bool:
    """Text, a number, a truth value, a class, or a list of those."""
    if isinstance(feature, list):
        return len(feature) == 1 and is_plain(feature[0])
    if type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return is_plain(feature.feature)
    return type(feature).__name__ == "ClassLabel" or (
        type(feature).__name__ == "Value" and "binary" not in feature.dtype
    )


def class_name_of(feature: Any) -> Any:
    """A function from a ClassLabel's number to its name, None for no number; None for other features."""
    if type(feature).__name__ != "ClassLabel":
        return None
    names = feature.names
    return lambda value: None if value is None or value < 0 else names[value]


def captions_of(value: Any, file: str, column: str) -> Sequence[str]:
    """The captions of one image, one or several.

    Raises:
        UserError: there is none, or it is no text.
    """
    captions = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not captions or not all(isinstance(caption, str) for caption in captions):
        text = json.dumps(value, default=str)[:60]
        raise UserError(file, f"got {text} in column {column}; expected a caption, or a list of them. Correct the row.")
    return captions
