"""Kinds of accelerators, with their makers' specifications."""

import argparse
import re
from dataclasses import dataclass

from g2rpo_ray.messages import shown

MAX_DEVICES, MAX_PRICE, MAX_TFLOPS = 100_000, 10_000.0, 1e6
GIVEN = re.compile(r"(?P<kind>[a-z0-9.]+):(?P<number>\d{1,6})(?:@(?P<price>\d{1,6}(?:\.\d{1,6})?))?")
OWN_RATE = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)tflops")


@dataclass(frozen=True, slots=True)
class Device:
    """Dense rate of matrix products in bfloat16, in 10^12 operations per second, and memory in GB."""

    tflops: float
    gigabytes: float | None = None


DEVICES = {  # data sheets of NVIDIA and AMD, of the SXM or OAM form where there are several; without sparsity
    "a100": Device(312, 80),
    "a800": Device(312, 80),
    "b200": Device(2250, 180),
    "h100": Device(989, 80),
    "h20": Device(148, 96),
    "h200": Device(989, 141),
    "h800": Device(989, 80),
    "l20": Device(119.5, 48),
    "l40s": Device(362, 48),
    "mi300x": Device(1307, 192),
    "rtx4090": Device(165, 24),
}


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices of one kind, with the price of one per hour, if known."""

    kind: str
    device: Device
    number: int
    price: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Fleet":
        """From KIND:NUMBER or KIND:NUMBER@PRICE; KIND is a name of `DEVICES`, or a rate such as 350tflops.

        Raises:
            ValueError: one line, without the option's name.
        """
        found = GIVEN.fullmatch(text.lower())
        device = _device(found["kind"]) if found else None
        number, price = (int(found["number"]), found["price"]) if found else (0, None)
        if found is None or device is None or not 1 <= number <= MAX_DEVICES or float(price or 0) > MAX_PRICE:
            raise ValueError(
                f"{shown(text)} given; expected KIND:NUMBER or KIND:NUMBER@PRICE, such as h100:8@2.50, with at most "
                f"{MAX_DEVICES:,} devices and the price of one per hour; kinds are {', '.join(DEVICES)}, or a dense "
                "bfloat16 rate such as 350tflops"
            )
        return cls(found["kind"], device, number, None if price is None else float(price))


def fleet(text: str) -> Fleet:
    """`Fleet.parse` for a command's option."""
    try:
        return Fleet.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(kind: str) -> Device | None:
    rate = OWN_RATE.fullmatch(kind)
    if rate and 0 < float(rate[1]) <= MAX_TFLOPS:
        return Device(float(rate[1]))
    return DEVICES.get(kind)
