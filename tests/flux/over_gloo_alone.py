"""The trainer, without the collectives that DeepSpeed compiles for CPUs, which takes a minute."""

import runpy

import deepspeed.ops

from tests.flux.worlds import SCRIPT

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    runpy.run_path(str(SCRIPT), run_name="__main__")
