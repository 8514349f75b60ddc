"""DICOM files become what a viewer shows, and nothing about a patient leaves them."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.data.custom.folder import read_sides
from instructblip.data.prepared.check import check_dataset
from instructblip.data.reading import decode as images_module
from instructblip.data.reading import dicom as dicom_module
from instructblip.data.reading.decode import Window, decode_image, examine_image
from instructblip.data.reading.images import load_image
from tests.testing import prepare_vizwiz, write_json_lines

pydicom = pytest.importorskip("pydicom")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian  # noqa: E402

NAME = "Doe^Jane"
PATIENT = {"PatientName": NAME, "PatientID": "4711-0815", "PatientBirthDate": "19700101"}


def dicom(values: np.ndarray | None, syntax: str = ExplicitVRLittleEndian, **more: Any) -> bytes:
    """A file with 12 bits of 16, and the elements ``more``."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3"
    elements: dict[str, Any] = dict(PATIENT)
    if values is not None:
        rows, columns = values.shape[-2:]
        elements |= {
            "Rows": rows, "Columns": columns, "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12,
            "HighBit": 11, "PixelRepresentation": 0,
            "PixelData": values.astype(np.uint16).tobytes(),
        }  # fmt: skip
    for name, value in (elements | more).items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def compressed(syntax: str) -> bytes:
    """A file whose compressed pixels are zeros."""
    return dicom(RAMP, syntax, PixelData=encapsulate([b"\0" * 8]))


RAMP = np.linspace(0, 3459, 4096).reshape(64, 64).round()


def ends(data: bytes, window: Window = "auto") -> tuple[int, int]:
    """The grey values of the first and the last pixel of the ramp."""
    shown = np.asarray(decode_image(data, "x.dcm", window))
    assert shown.shape == (64, 64, 3)
    return int(shown[0, 0, 0]), int(shown[-1, -1, 0])


def test_values_are_rescaled_windowed_and_inverted() -> None:
    whole = dicom(RAMP)
    assert ends(whole) == (0, 215)  # of 12 bits
    assert ends(whole, (0.0, 3459.0)) == (0, 255)
    assert ends(dicom(RAMP, PhotometricInterpretation="MONOCHROME1")) == (255, 40)
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    assert ends(dicom(RAMP, **hounsfield), (-1024.0, 2435.0)) == (0, 255)
    assert ends(dicom(RAMP, **hounsfield), "full") == (0, 215)
    window = {"WindowCenter": [1000.5, 5], "WindowWidth": [1001, 6]}  # 500 to 1500; then others
    middle = np.asarray(decode_image(dicom(RAMP, **window), "x"))[:, :, 0]
    assert middle[RAMP <= 500].max() == 0
    assert middle[RAMP >= 1500].min() == 255
    assert middle[RAMP == 1000].tolist() in ([127], [128])
    assert ends(dicom(RAMP, **window, **hounsfield)) == (0, 255)
    assert np.asarray(decode_image(dicom(RAMP, **window), "x", "full")).max() == 215
    narrow = dicom(RAMP / 8, BitsStored=16, HighBit=15)  # no window, 433 of 65536 values
    assert ends(narrow) == (0, 255)
    assert ends(narrow, "full") == (0, 2)


def test_a_table_of_grey_values() -> None:
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.LUTData = np.arange(65520, -1, -16, dtype=np.uint16).tobytes()
    assert ends(dicom(RAMP, VOILUTSequence=[table])) == (255, 40)


def test_several_frames_show_the_middle_one(tmp_path: Path) -> None:
    frames = np.stack([np.full((64, 64), grey) for grey in (0, 4095, 0)])
    data = dicom(frames, NumberOfFrames=3)
    assert ends(data) == (255, 255)
    assert (
        examine_image(data)[1] == "several frames: 3 frames, of which the model sees the middle one"
    )
    # an enhanced file has a window for each frame
    group, window = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 8190, 8191
    group.FrameVOILUTSequence = [window]
    enhanced = dicom(
        frames, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=[Dataset(), group, Dataset()]
    )
    assert ends(enhanced) == (0, 0)


def test_colours() -> None:
    red = np.full((64, 64), 200)
    colours = np.stack([red, red * 0, red * 0], 2).astype(np.uint8)
    data = dicom(
        red,
        SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
        BitsStored=8, HighBit=7, PixelData=colours.tobytes(),
    )  # fmt: skip
    assert decode_image(data, "x").getpixel((3, 3)) == (200, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom(None), "a DICOM file without pixels"),
        (compressed(uid.JPEGLosslessSV1), "decodes DICOM's JPEG Lossless.*gdcmconv.*pylibjpeg"),
        (compressed(uid.JPEGLSLossless), "decodes DICOM's JPEG-LS Lossless.*gdcmconv.*pylibjpeg"),
        (compressed(uid.MPEG2MPML), "decodes DICOM's MPEG2 Main Profile"),
        (compressed(uid.RLELossless), r"damaged \(RuntimeError\)"),
        (compressed(uid.JPEGBaseline8Bit), r"damaged \(RuntimeError\)"),
        (b"\0" * 128 + b"DICM", "a DICOM file without pixels"),
        (dicom(RAMP)[:-5000], r"damaged \(ValueError\)"),
        (dicom(RAMP, Rows=9000, Columns=9001), "9001 x 9000 pixels; at most"),
        (dicom(RAMP, BitsStored=None), "damaged"),
        (dicom(RAMP, WindowCenter=1, WindowWidth=1, NumberOfFrames=9), "damaged"),
    ],
)
def test_what_cannot_be_read_is_named_without_the_patient(
    data: bytes, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(
            ValueError, match=rf"scan\.dcm: (cannot be decoded: .*|no installed .*){reason}"
        ) as caught:
            load_image(path)
    quoted = f"{caught.value} {caught.value.__cause__} {caplog.text} {[str(w) for w in warned]}"
    assert not any(value in quoted for value in PATIENT.values())
    assert examine_image(data)[0]


def test_nothing_about_a_patient_is_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, data in (("a.dcm", dicom(RAMP)), ("b.dcm", dicom(RAMP)[:-5000])):
        (tmp_path / "images" / name).write_bytes(data)
    assert NAME.encode() in dicom(RAMP)
    dataset = prepare_vizwiz(tmp_path, [{"image": "a.dcm"}, {"image": "b.dcm"}])
    diagnosis = check_dataset(dataset)
    assert diagnosis.kinds == {"unreadable image": 1}
    written = [path for path in (tmp_path / "prepared").rglob("*") if path.is_file()]
    assert len(written) > 3
    for path in written:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in PATIENT.values()), path
    shown = io.BytesIO()
    load_image(tmp_path / "images" / "a.dcm").save(shown, "PNG")
    assert json.dumps(NAME)[1:-1].encode() not in shown.getvalue()


def test_nothing_about_a_patient_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Dataset] = []
    decode = dicom_module._decode
    monkeypatch.setattr(dicom_module, "_decode", lambda data: parsed.append(data) or decode(data))
    dicom_module.read_dicom(dicom(RAMP), 1 << 20)
    assert {element.keyword for element in parsed[0]} <= {*dicom_module._TAGS}
    assert NAME not in str(parsed[0])


def test_a_folder_of_scans_is_split_by_patient(tmp_path: Path) -> None:
    names = [f"p{i // 2}_{i}.dcm" for i in range(8)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(dicom(np.roll(RAMP, 500 * i)))
    rows = [{"file_name": n, "caption": "x", "patient": n[:2]} for n in names]
    write_json_lines(tmp_path / "metadata.jsonl", *rows)
    for group in ("patient", r"(p\d)_"):
        split = read_sides(tmp_path, group=group)
        training, held = (
            {(e.extra["group"], e.images[0][:2]) for e in side.examples}
            for side in (split.training, split.validation)
        )
        assert len(training) + len(held) == 4
        assert all(patient == prefix for patient, prefix in training | held)
        assert NAME not in repr(split)
    (tmp_path / names[3]).write_bytes(dicom(RAMP)[:-5000])
    with pytest.raises(ValueError, match=r"1 of 8 .*:\n[^\n]*p1_3\.dcm: .*damaged.*$") as error:
        read_sides(tmp_path, group="patient")
    assert not any(value in str(error.value) for value in PATIENT.values())


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    message = r"x\.dcm: DICOM needs pydicom: pip install 'instructblip\[medical\]'$"
    with pytest.raises(ValueError, match=message):
        decode_image(dicom_bytes := b"\0" * 128 + b"DICM", "x.dcm")
    assert "instructblip[medical]" in examine_image(dicom_bytes)[0]
    assert images_module.is_dicom(dicom_bytes)
