import os
import sys

from experiments import interrupts

if sys.argv[:1] == ["-m"]:  # `python -m experiments.NAME` begins; it is not a test or a notebook that imports a part
    interrupts.install()

# Shows MindSpore's errors alone: it would warn of every function that is compiled for a second shape. Set GLOG_v=2 to see warnings.
os.environ.setdefault("GLOG_v", "3")
# Makes waiting OpenMP threads sleep instead of spin. MindSpore calls kernels from several threads, each with its own OpenMP team,
# and spinning teams would take the cores from each other. MindSpore reads the variable when it is imported, so it is set here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
