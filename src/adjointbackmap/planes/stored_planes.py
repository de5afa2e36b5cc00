"""Stored hyperplanes: a store on disk, read one part at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.display import Shown, Summary
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.hyperplane import Hyperplanes, relative_error
from adjointbackmap.planes.manifest import CheckedStore, Manifest, metadata_of
from adjointbackmap.planes.query import Block, bytes_of
from adjointbackmap.planes.streaming import tiles
from adjointbackmap.planes.units import Selection
from adjointbackmap.rules.curved import NOTE

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, repr=False)
class StoredPlanes(Shown):
    """Hyperplanes in a store on disk.

    Made by :func:`adjointbackmap.save` and :func:`adjointbackmap.open`.

    Attributes:
        path: Folder of the store.
    """

    path: Path

    def _summary(self) -> Summary:
        about = self.attributes
        extents = (f"{name} {n}" for name, n in zip(self.dims, self.shape, strict=True))
        facts = {
            "layer": f"{about['layer']} in {about['mode']}",
            "hyperplanes": ", ".join(extents),
            "dtype": str(about["dtype"]),
        }
        if about.get("curved") == "frozen":
            facts["gates"] = NOTE
        return Summary(f"StoredPlanes in {self.path}", facts)

    @property
    def attributes(self) -> dict[str, Any]:
        """The settings that made the hyperplanes, and the layout of the blocks.

        The settings are weights, versions, layer, mode, k, dtype, and where each bias is in b.
        """
        return self.manifest.attributes

    @cached_property
    def manifest(self) -> Manifest:
        """The files that the store must have.

        Raises:
            FileNotFoundError: If there is no store.
        """
        found = metadata_of(self.path)
        if not found:
            msg = (
                "path must be a folder that save or the command map wrote. "
                f"Got {self.path}, which is none."
            )
            raise FileNotFoundError(msg)
        return Manifest(self.path, found)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions of images and units."""
        return ("n", *self.attributes["unit dimensions"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Images and units, ``(N, *units)``."""
        return tuple(self.attributes["shape"])

    @property
    def value(self) -> Tensor:
        """Values of the units in the untouched model, ``(N, *units)``."""
        return _tensor_of_array(self._data["value"])

    @property
    def x(self) -> Tensor:
        """The images, ``(N, C, H, W)``."""
        return _tensor_of_array(self._data["x"])

    @property
    def records(self) -> list[Path]:
        """Files with the checksums of the metadata and of each block.

        A record is written as soon as the files that it names are on the disk.
        """
        return self.manifest.records

    def to_xarray(self) -> "xarray.Dataset":
        """The store with labelled dimensions, with image parts as they are stored.

        Arrays are read when they are used.
        """
        return self._data.copy()

    def planes(
        self,
        network: Network,
        units: Any = (),
        images: int | slice = slice(None),
        memory: str | float | int | None = "2GiB",
    ) -> Hyperplanes:
        """Some of the hyperplanes in memory, as :func:`adjointbackmap.hyperplanes` gives them.

        Args:
            network: The network of the hyperplanes.
            units: An int or slice along each of the stored unit dimensions, or along the first few;
                by default all units.
            images: Index of an image, or a slice of the images.
            memory: Largest size of dense image parts in bytes.

        Raises:
            ValueError: If the network has other weights.
        """
        self._check(network)
        chosen = slice(images, images + 1) if isinstance(images, int) else images
        key = (chosen, *(units if isinstance(units, tuple) else (units,)))
        return self._planes(key, network, bytes_of(memory))

    def iter_planes(
        self, network: Network, memory: str | float | int | None = "2GiB"
    ) -> Iterator[Hyperplanes]:
        """All hyperplanes, one chunk at a time.

        Args:
            network: The network of the hyperplanes.
            memory: Largest size of a chunk's dense image parts in bytes.

        Returns:
            An iterator over parts of the units, in order.

        Raises:
            ValueError: If the network has other weights.
        """
        self._check(network)
        return (self._planes(tile, network, bytes_of(memory)) for tile in self._tiles())

    def reconstruct(self, x: Tensor | None = None) -> Tensor:
        r"""The inner product :math:`\langle [x; b] | H \rangle`, ``(N, *units)``.

        It reads one chunk at a time.

        Args:
            x: Images ``(N, C, H, W)``, or one image ``(C, H, W)`` for all hyperplanes; by default
                the images of the hyperplanes.

        Raises:
            ValueError: If the shape does not fit.
        """
        own = self.x
        images = own if x is None else x
        whole = own.new_zeros(self.shape)
        b = _tensor_of_array(self._data["b"])
        if images.shape not in (own.shape, own.shape[1:]):
            msg = (
                f"x must have shape {tuple(own.shape[1:])} or {tuple(own.shape)}. "
                f"Got {tuple(images.shape)}."
            )
            raise ValueError(msg)
        images = images.to(own).expand(own.shape)
        for tile in self._tiles():
            part = self._part(tile)
            pixels = _inner(self._image(part), images[tile[0]])
            whole[tile] = pixels + (_tensor_of_array(part["bias"]) * b).sum(-1)
        return whole

    def relative_error(self) -> Tensor:
        """Signed relative error of the reconstruction [Wan2022, eq. 3.29], ``(N, *units)``."""
        return relative_error(self.reconstruct(), self.value)

    def damaged(self) -> list[str]:
        """Files that are missing or do not match their checksums.

        The same call of :func:`adjointbackmap.save` computes them again.
        """
        return [name for record in self.records for name in self.manifest.damaged(record)]

    @cached_property
    def _data(self) -> "xarray.Dataset":
        """The arrays of the store, which are read when they are used."""
        import xarray

        return xarray.open_zarr(CheckedStore(self.path, self.manifest.seals), chunks=None)

    def _tiles(self) -> list[Block]:
        """The images and units of each chunk, in order."""
        region = [slice(0, extent) for extent in self.shape]
        return tiles(region, self._data["value"].encoding["chunks"])

    def _part(self, key: tuple[int | slice, ...]) -> "xarray.Dataset":
        """The arrays of some images and units, in memory."""
        return self._data.isel(dict(zip(self.dims, key, strict=False))).load()

    def _image(
        self, part: "xarray.Dataset", device: torch.device | str = "cpu"
    ) -> Tensor | Patches:
        """Image parts, as patches if they were stored as patches."""
        values = _tensor_of_array(part["image"]).to(device)
        if "top" not in part:
            return values
        rows, columns = self._data["x"].shape[2:]
        corners = torch.stack([_tensor_of_array(part[name]) for name in ("top", "left")], -1)
        return Patches(values, corners, (rows, columns))

    def _check(self, network: Network) -> None:
        """Raise if a network is not that of the hyperplanes.

        Raises:
            ValueError: If it has other weights, or another reading of curved operations.
        """
        if network.weights_hash() != self.attributes["weights sha256"]:
            msg = (
                f"The network must have the weights that {self.path} was computed with. "
                "Got others: load and trace that model."
            )
            raise ValueError(msg)

        kept = {name: self.attributes.get(name) for name in ("curved", "products")}
        given = network.curved_settings
        if kept != {name: given.get(name) for name in kept}:
            msg = (
                "The network must be traced with the curved= and products= of the store, "
                f"{kept}. Got {given or 'a piecewise-affine network'}: trace it so."
            )
            raise ValueError(msg)

    def _planes(self, key: tuple[int | slice, ...], network: Network, memory: int) -> Hyperplanes:
        """The hyperplanes of some images and units, in memory."""
        part = self._part(key)
        attributes = self.attributes
        dims: dict[str, int] = attributes["mode dimensions"]
        # a selection has one row of units for all images, or one for each image
        units = part["value"] if any("n" in part[name].dims for name in dims) else part["value"][:1]
        places = [part[name].broadcast_like(units).transpose(*units.dims).values for name in dims]
        flat = torch.from_numpy(np.ravel_multi_index(places, tuple(dims.values())))
        return Hyperplanes(
            image_part=self._image(part, network.device),
            bias_part=_tensor_of_array(part["bias"]).to(network.device),
            entries=_tensor_of_array(part["entry"]),
            value=_tensor_of_array(part["value"]).to(network.device),
            x=_tensor_of_array(part["x"]).to(network.device),
            network=network,
            layer=attributes["layer"],
            mode=attributes["mode"],
            units=Selection(dims, flat, tuple(str(name) for name in units.dims[1:])),
            own_bias=attributes["own bias"],
            scale=attributes["k"],
            memory=memory,
        )


def _tensor_of_array(array: "xarray.DataArray") -> Tensor:
    """A tensor with the values of an array, in memory of its own."""
    return torch.from_numpy(np.array(array.values))


def _inner(image: Tensor | Patches, x: Tensor) -> Tensor:
    """Inner product of image parts and one image for each, ``(N, *units)``."""
    if isinstance(image, Patches):
        return image.inner(x)
    axes = x.dim() - 1
    # (N, 1 for each dimension of the units, C, H, W)
    images = x.view(len(x), *(1,) * (image.dim() - x.dim()), *x.shape[1:])
    return (image * images).flatten(-axes).sum(-1)
