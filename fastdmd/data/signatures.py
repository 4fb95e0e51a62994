"""What files of pictures begin with, whatever they are called."""

from __future__ import annotations

import re

NUM_BYTES = 512  # that are looked at

# Whole signatures of those formats that have one, not the two letters of some: a text may begin with BM or P3.
PICTURE = re.compile(
    rb"\x89PNG\r\n|\x8aMNG\r\n|\x8bJNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}"
    rb"|II[*+]\0|MM\0[*+]|II\xbc|IIR[OS]|IIU\0|FUJIFILMCCD|P[1-7]\s+(\d+\s|#|WIDTH)|P[Ff]\n\d"
    rb"|.{4}ftyp(avi[fos]|he[iv][a-z]|mif[12]|msf1|miaf|crx )"
    rb"|\0\0\0\x0c(jP  |JXL )\r\n\x87\n|\xff\x4f\xff\x51|\xff\x0a"  # JPEG 2000 and JPEG XL
    rb"|8BPS|DDS |v/1\x01|qoif|SIMPLE  =|#\?R(ADIANC|GB)E|\x59\xa6\x6a\x95|\x01\xda[\0\1][\1\2]|gimp xcf|BPG\xfb|FLIF"
    rb"|icns|/\* XPM|\0\0[\1\2]\0[\1-\xff]\0..\0|\x0a[\0\2-\5]\x01[\1\2\4\x08]|BLP[12]|DanM|AT&TFORM|farbfeld"
    rb"|%!PS-Adobe-\S+ EPSF|\xc5\xd0\xd3\xc6|\xd7\xcd\xc6\x9a|.{128}DICM"
    rb"|(\xef\xbb\xbf)?\s*<(svg[\s>]|[?!].{0,400}<svg[\s>])",
    re.DOTALL,
)


def is_picture(start: bytes) -> bool:
    """Whether the first `NUM_BYTES` of a file are those of a picture in a format that is in use."""
    return PICTURE.match(start) is not None
