"""Which scanner made a slide: its model, by a list of known names.

Files carry text that anyone may have typed, device ids and serial numbers beside the model. So no text of a file is
taken over: a model counts when its name is on the list here, and the list's own words are what results hold.
"""

import re
from collections.abc import Mapping

__all__ = ["MODELS", "MODEL_PROPERTIES", "scanner_model"]

# Properties that name the model. Not aperio.ScanScope ID, hamamatsu.NDP.S/N and their like: those are single devices.
MODEL_PROPERTIES = (
    "aperio.ScannerType",
    "dicom.ManufacturerModelName",
    "hamamatsu.Product",
    "leica.device-model",
    "philips.DICOM_MANUFACTURERS_MODEL_NAME",
    "tiff.Model",
    "ventana.ScannerModel",
)

# Model, and a pattern that its many spellings have in common (upper case, blanks and punctuation left out).
MODELS = {
    "Aperio GT 450": "GT450",
    "Aperio AT2": "AT2",
    "Aperio AT Turbo": "ATTURBO",
    "Aperio CS2": "SCANSCOPECS2|APERIOCS2|^CS2$",
    "Aperio Versa": "VERSA(8|200)?$",
    "Hamamatsu NanoZoomer 2.0-HT (C9600)": "C9600|NANOZOOMER20?HT",
    "Hamamatsu NanoZoomer 2.0-RS (C10730)": "C10730|NANOZOOMER20?RS",
    "Hamamatsu NanoZoomer XR (C12000)": "C12000|NANOZOOMERXR",
    "Hamamatsu NanoZoomer SQ (C13140)": "C13140|NANOZOOMERSQ",
    "Hamamatsu NanoZoomer S60 (C13210)": "C13210|NANOZOOMERS60",
    "Hamamatsu NanoZoomer S210 (C13239)": "C13239|NANOZOOMERS210",
    "Hamamatsu NanoZoomer S360 (C13220)": "C13220|NANOZOOMERS360",
    "Hamamatsu NanoZoomer S20 (C16300)": "C16300|NANOZOOMERS20(MD)?$",
    "Leica SCN400": "SCN400",
    "Philips Ultra Fast Scanner": "^UFS|ULTRAFASTSCANNER|PHILIPSUFS",
    "Philips SG300": "SG300",
    "Philips SG60": "SG60",
    "Ventana DP 200": "DP200",
    "Ventana DP 600": "DP600",
    "Ventana iScan HT": "ISCANHT",
    "Ventana iScan Coreo": "COREO",
    "3DHISTECH Pannoramic 250": "PANNORAMIC250|PANORAMIC250|^P250",
    "3DHISTECH Pannoramic 1000": "PANNORAMIC1000|PANORAMIC1000|^P1000",
    "3DHISTECH Pannoramic SCAN": "PANNORAMICSCAN",
    "3DHISTECH Pannoramic MIDI": "PANNORAMICMIDI",
    "3DHISTECH Pannoramic DESK": "PANNORAMICDESK",
    "Zeiss Axio Scan.Z1": "AXIOSCANZ1",
    "Zeiss Axioscan 7": "AXIOSCAN7",
    "Olympus/Evident VS120": "VS120",
    "Olympus/Evident VS200": "VS200",
    "Huron TissueScope": "TISSUESCOPE",
    "Grundium Ocus": "OCUS(20|40)?",
    "Motic EasyScan": "EASYSCAN",
    "KFBio KF-PRO": "KFPRO",
}


def scanner_model(properties: Mapping[str, str | None]) -> str | None:
    """The first model of the list that a property names, or None.

    Args:
        properties: Those of `MODEL_PROPERTIES`, as far as the file has them.
    """
    for name in MODEL_PROPERTIES:
        text = re.sub(r"[^A-Z0-9]", "", (properties.get(name) or "").upper())
        for model, pattern in MODELS.items():
            if text and re.search(pattern, text):
                return model
    return None
