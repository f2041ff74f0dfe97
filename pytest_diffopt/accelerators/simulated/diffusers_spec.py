"""The simulated device for a test suite that takes its device from a specification file, as diffusers' and transformers' do.

diffusers imports the file by its name from the current directory, so a copy is put there::

    cp "$(python -c 'import pytest_diffopt.accelerators.simulated.diffusers_spec as spec; print(spec.__file__)')" .
    export DIFFUSERS_TEST_BACKEND=pytest_diffopt.accelerators.simulated
    export DIFFUSERS_TEST_DEVICE=sim
    export DIFFUSERS_TEST_DEVICE_SPEC=diffusers_spec.py

Such a suite has nowhere to open a context, so importing this adapts the libraries' lists of devices until the process ends.
"""

import torch

from pytest_diffopt.accelerators.simulated import adapt_libraries

adapt_libraries()

DEVICE_NAME = "sim"
SUPPORTS_TRAINING = True

MANUAL_SEED_FN = torch.sim.manual_seed  # type: ignore[attr-defined]
EMPTY_CACHE_FN = torch.sim.empty_cache  # type: ignore[attr-defined]
DEVICE_COUNT_FN = torch.sim.device_count  # type: ignore[attr-defined]
SYNCHRONIZE_FN = torch.sim.synchronize  # type: ignore[attr-defined]
RESET_PEAK_MEMORY_STATS_FN = torch.sim.reset_peak_memory_stats  # type: ignore[attr-defined]
RESET_MAX_MEMORY_ALLOCATED_FN = torch.sim.reset_max_memory_allocated  # type: ignore[attr-defined]
MAX_MEMORY_ALLOCATED_FN = torch.sim.max_memory_allocated  # type: ignore[attr-defined]
