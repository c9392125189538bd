"""A picture, and how far the corruptions of another library take it from itself.

Numbers of imagecorruptions-imaug 1.1.5 (Apache-2.0; a kept copy of the package of Michaelis et al. 2019) on `picture`:
of each kind at severities 1 to 5 the mean absolute difference to the clean picture in grey levels and the PSNR in dB,
means of 24 draws (glass_blur: 6), rounded before they become bytes. Frost is left out: its photographs are not ours.
"""

import cv2
import numpy as np

NUMBERS = {
    "gaussian_noise": ((16.17, 21.99), (24.09, 18.54), (35.45, 15.24), (48.95, 12.55), (64.91, 10.29)),
    "shot_noise": ((17.58, 21.12), (26.94, 17.46), (38.06, 14.56), (56.34, 11.36), (69.64, 9.66)),
    "impulse_noise": ((3.82, 20.71), (7.70, 17.67), (11.51, 15.92), (21.67, 13.18), (34.36, 11.18)),
    "defocus_blur": ((7.28, 23.91), (9.29, 22.71), (13.00, 20.88), (15.99, 19.69), (18.58, 18.77)),
    "glass_blur": ((8.65, 22.62), (9.17, 22.81), (15.42, 19.67), (14.91, 20.11), (16.93, 19.43)),
    "motion_blur": ((9.97, 22.09), (15.17, 19.94), (20.54, 18.35), (24.83, 17.27), (27.07, 16.74)),
    "zoom_blur": ((10.27, 21.59), (13.05, 20.34), (15.25, 19.78), (17.32, 19.13), (19.32, 18.74)),
    "snow": ((44.28, 14.49), (72.94, 10.29), (71.62, 10.36), (86.16, 8.79), (104.04, 7.35)),
    "fog": ((31.28, 16.37), (34.69, 15.47), (38.53, 14.58), (39.22, 14.44), (40.96, 14.05)),
    "brightness": ((19.49, 21.92), (37.97, 16.07), (54.50, 12.83), (66.44, 10.99), (72.77, 10.06)),
    "contrast": ((22.55, 19.31), (26.30, 17.97), (30.07, 16.81), (33.82, 15.79), (35.70, 15.32)),
    "elastic_transform": ((6.14, 22.73), (7.71, 21.46), (9.72, 20.24), (11.20, 19.50), (13.09, 18.71)),
    "pixelate": ((3.81, 26.35), (4.47, 25.68), (5.75, 24.54), (7.85, 22.97), (9.02, 22.33)),
    "jpeg_compression": ((11.02, 22.80), (11.92, 22.20), (12.53, 21.91), (14.35, 21.18), (16.59, 20.23)),
    "speckle_noise": ((14.33, 22.52), (18.98, 20.10), (32.37, 15.57), (40.58, 13.70), (51.32, 11.85)),
    "gaussian_blur": ((4.51, 26.61), (8.54, 23.42), (11.86, 21.65), (14.60, 20.45), (18.78, 18.93)),
    "spatter": ((1.37, 29.44), (4.99, 23.67), (8.11, 21.78), (8.82, 18.97), (14.23, 16.83)),
    "saturate": ((26.33, 16.01), (33.86, 13.83), (26.61, 16.51), (40.84, 12.87), (41.57, 12.71)),
}


def picture():
    """Smooth hills of colour with sharp discs and lines: uint8 (96, 128, 3)."""
    rng = np.random.default_rng(11)
    hills = cv2.resize(rng.uniform(60, 200, (5, 6, 3)), (128, 96), interpolation=cv2.INTER_CUBIC)
    image = np.clip(hills, 0, 255).astype(np.uint8)
    for _ in range(40):
        centre = (int(rng.integers(128)), int(rng.integers(96)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        cv2.circle(image, centre, int(rng.integers(2, 9)), colour, -1)
    return image
