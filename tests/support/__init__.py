"""What tests share: each family's table of cases, judges in float64, and what runs kernels without their device."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
