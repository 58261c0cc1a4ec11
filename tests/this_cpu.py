"""What this CPU does with products of int8."""

from pathlib import Path


def overflows_int8() -> bool:
    """Whether it adds them in 16 bits: x86 with AVX2 and without VNNI. Linux alone tells."""
    told = Path("/proc/cpuinfo")
    words = set(told.read_text().split()) if told.exists() else set()
    return "avx2" in words and not any(word.endswith("_vnni") for word in words)
