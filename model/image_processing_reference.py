# SPDX-License-Identifier: Apache-2.0
"""Images of any size to patches. Needs Pillow and NumPy; torchvision is not needed."""

import numpy as np
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs


class ReferenceImagesKwargs(ImagesKwargs, total=False):
    """What a call may set beyond transformers' own arguments."""

    patch_size: int


class ReferenceImageProcessor(PilBackend):
    """Scales an image, keeping its shape as nearly as whole patches allow, and cuts it into patches.

    An image larger than `size` is made smaller to fit; none is made larger, except to the next whole patch. Images keep
    their own number of patches: those of all images of a call lie behind one another, and nothing is padded.

    A call returns `pixel_values`, float32 `[patches of all images, channels * patch_size * patch_size]`, scaled to
    -1 .. 1, and `image_grid_thw`, int64 `[images, 3]`: frames (1), rows and columns of patches of each image.
    """

    valid_kwargs = ReferenceImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]
    resample = PILImageResampling.BILINEAR
    size = {"max_height": 48, "max_width": 48}
    patch_size = 8
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def grid_of(
        self, height: int, width: int, size: SizeDict | dict | None = None, patch_size: int | None = None
    ) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` by `width` pixels, at least one of each.

        Raises:
            ValueError: for an image without pixels, or a `size` that says no `max_height` and `max_width`.
        """
        if height < 1 or width < 1:
            raise ValueError(f"an image must be at least 1 by 1 pixels, got {height} by {width}.")
        size = dict(self.size if size is None else size)
        patch_size = self.patch_size if patch_size is None else patch_size
        limits = size.get("max_height"), size.get("max_width")
        if None in limits or min(limits) < patch_size:
            raise ValueError(
                f"size must hold max_height and max_width of at least one patch, {patch_size} pixels, got {size}."
            )
        scale = min(1.0, limits[0] / height, limits[1] / width)
        rows, columns = (
            min(max(1, round(side * scale / patch_size)), limit // patch_size)
            for side, limit in zip((height, width), limits, strict=True)
        )
        return rows, columns

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        patch_size: int,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Images [channels, height, width] to what the class says a call returns."""
        if not images:
            raise ValueError("images must hold at least one image, got none; leave the argument out.")
        patches, grids = [], []
        for image in images:
            rows, columns = self.grid_of(*image.shape[-2:], size=size, patch_size=patch_size)
            exact = SizeDict(height=rows * patch_size, width=columns * patch_size)
            if image.shape[-2:] != (exact.height, exact.width):
                if not do_resize:
                    raise ValueError(
                        f"an image of {image.shape[-2]} by {image.shape[-1]} pixels is not {rows} by {columns} whole "
                        f"patches of {patch_size} pixels; leave do_resize at True."
                    )
                image = self.resize(image, exact, resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            patches.append(cut_into_patches(image, patch_size))
            grids.append((1, rows, columns))
        data = {
            "pixel_values": np.concatenate(patches).astype(np.float32),
            "image_grid_thw": np.array(grids, dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)


def cut_into_patches(image: np.ndarray, patch_size: int) -> np.ndarray:
    """[channels, height, width] to [patches, channels * patch_size * patch_size], row after row of patches."""
    channels, height, width = image.shape
    tiles = image.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return tiles.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch_size * patch_size)


ReferenceImageProcessor.register_for_auto_class("AutoImageProcessor")
