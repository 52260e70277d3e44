"""Images, augmentation and loaders."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning_radam.competition.folds import read_folds
from lightning_radam.competition.tables import image_paths, read_table
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from . import settings


class Images(Dataset):
    """Pairs of an image and the index of its class; -1 where there is no label."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: v2.Transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


class ImageData(L.LightningDataModule):
    """The rows of one fold to validate on, all others to train on.

    Args:
        fold: The fold that is held out.
        image_size: Side of the square that images are resized to, in pixels.
        batch_size: Images per optimizer update.
        num_workers: Processes that load images; 0 loads in the training process.
        horizontal_flip: Whether a mirrored image keeps its label.
    """

    def __init__(
        self,
        fold: int = 0,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 4,
        horizontal_flip: bool = True,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.fold, self.batch_size, self.num_workers = fold, batch_size, num_workers
        see = [
            v2.ToImage(),
            v2.Resize((image_size, image_size), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
        vary = [v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))]
        if horizontal_flip:
            vary.append(v2.RandomHorizontalFlip())
        self.train_transform = v2.Compose([*see[:2], *vary, *see[2:]])
        self.transform = v2.Compose(see)

    def setup(self, stage: str) -> None:
        train = read_table(settings.TRAIN_CSV, settings.ID, settings.TARGET)
        folds = read_folds(settings.FOLDS_CSV, train, settings.ID).set_index(settings.ID)["fold"]
        index = {label: i for i, label in enumerate(classes())}
        held_out = train[settings.ID].map(folds) == self.fold
        self.val_ids = train[settings.ID][held_out].tolist()
        self.train_set = self._images(train[~held_out], index, self.train_transform)
        self.val_set = self._images(train[held_out], index, self.transform)

    def _images(self, rows, index: dict[str, int], transform: v2.Transform) -> Images:
        paths = image_paths(settings.ROOT, settings.TRAIN_IMAGES, rows[settings.ID].tolist())
        return Images(paths, rows[settings.TARGET].map(index).tolist(), transform)

    def train_dataloader(self) -> DataLoader:
        # A last batch of one image would break batch normalisation.
        drop_last = len(self.train_set) > self.batch_size
        return self._loader(self.train_set, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def test_dataloader(self, ids: Sequence[str]) -> DataLoader:
        paths = image_paths(settings.ROOT, settings.TEST_IMAGES, ids)
        return self._loader(Images(paths, [-1] * len(paths), self.transform))

    def _loader(self, images: Images, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return DataLoader(
            images,
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def classes() -> list[str]:
    """All labels, sorted: the order of the model's outputs."""
    train = read_table(settings.TRAIN_CSV, settings.ID, settings.TARGET)
    return sorted(train[settings.TARGET].unique())
