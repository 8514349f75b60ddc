"""One image of a DICOM file, read by pydicom (the extra ``instructblip[medical]``).

Only the elements that describe pixels are read. Names, dates and numbers of a patient are skipped,
so they cannot appear in a message, a log or a file.
"""

import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "PixelData", "FloatPixelData", "DoubleFloatPixelData",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dicom:
    """The middle frame of a DICOM file: grey values [H, W] after rescaling, such as Hounsfield
    units, or colours [H, W, 3].

    ``window`` has the grey values that the file wants to be black and white, if it says so;
    ``full`` the ends of its type. ``inverted``: low values are bright (MONOCHROME1).
    """

    values: np.ndarray
    full: tuple[float, float]
    window: tuple[float, float] | None = None
    inverted: bool = False
    num_frames: int = 1


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are those of a DICOM file (part 10 of the standard)."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, max_pixels: int) -> Dicom:
    """The image of a DICOM file.

    Raises ImportError without pydicom, or where no installed package decodes the compression, and
    ValueError for a file without pixels, with more than ``max_pixels`` in a frame, or damaged.
    """
    try:
        import pydicom
    except ImportError:
        raise ImportError("DICOM needs pydicom: pip install 'instructblip[medical]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=_TAGS)
            rows, columns = int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))
            has_pixels = any(name in dataset for name in _TAGS[-3:])
            is_small = rows * columns <= max_pixels
            if has_pixels and is_small:
                return _decode(dataset)
        except ImportError:
            raise
        except Exception as error:  # of any class, with a message that may quote the file
            raise ValueError(f"the DICOM file is damaged ({type(error).__name__})") from None
    if not has_pixels:
        raise ValueError("a DICOM file without pixels")
    raise ValueError(f"{columns} x {rows} pixels; at most {max_pixels}")


def _decode(dataset: Any) -> Dicom:
    from pydicom.pixels.processing import apply_color_lut, apply_rescale, apply_voi
    from pydicom.pixels.utils import pixel_array

    _refuse_undecodable(dataset.file_meta.TransferSyntaxUID)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    middle = num_frames // 2
    pixels = pixel_array(dataset, index=middle)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.ndim == 3:
        deepest = 8 * pixels.dtype.itemsize if kind == "PALETTE COLOR" else dataset.BitsStored
        return Dicom(pixels, (0.0, 2.0**deepest - 1), num_frames=num_frames)
    _lift_frame_values(dataset, middle)
    bits, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0))
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    full = apply_rescale(ends, dataset)
    values, window = apply_rescale(pixels, dataset), _window(dataset)
    if window is None and dataset.get("VOILUTSequence"):
        values = apply_voi(values.astype(np.int64), dataset)
        first = np.iinfo(np.int32)
        full = apply_voi(np.array([first.min, first.max]), dataset)
        window = float(full.min()), float(full.max())
    return Dicom(
        values.astype(np.float64),
        (float(full.min()), float(full.max())),
        window,
        inverted=kind == "MONOCHROME1",
        num_frames=num_frames,
    )


def _refuse_undecodable(syntax: Any) -> None:
    """ImportError if no installed package decodes a transfer syntax."""
    from pydicom.pixels.decoders.base import get_decoder

    try:
        is_available = get_decoder(syntax).is_available
    except NotImplementedError:  # such as that of a video
        is_available = False
    if not is_available:
        raise ImportError(
            f"no installed package decodes DICOM's {syntax.name}: `gdcmconv --raw` writes the file "
            "without compression; `pip install 'pylibjpeg[all]'` decodes JPEG, JPEG-LS, JPEG 2000"
        )


def _lift_frame_values(dataset: Any, frame: int) -> None:
    """Copy rescaling and window of an enhanced multi-frame file to where a plain one has them."""
    for name, number in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        if not (groups := dataset.get(name)):
            continue
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if found := groups[number].get(macro):
                dataset.update(found[0])


def _window(dataset: Any) -> tuple[float, float] | None:
    """The first window of the file (part 3 of the standard, C.11.2.1.2.1); a sigmoid as the line of
    the same centre and width."""
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center is None or width is None:
        return None
    center, width = (float(np.atleast_1d(value)[0]) for value in (center, width))
    if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR":
        center, width = center - 0.5, width - 1
    return (center - width / 2, center + width / 2) if width > 0 else None
