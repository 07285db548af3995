"""Imported once by the server that resuming.py forks its processes from: what every Cream search would measure anew."""

from __future__ import annotations

from search_spaces.cream import plan_space
from tests.resuming import CREAM

plan_space(CREAM["flops"]["min"], CREAM["flops"]["max"], CREAM["data"]["resolution"])
