import os

# MindSpore warns of every function that is compiled for a second shape; errors still show. Set GLOG_v=2 to see warnings.
os.environ.setdefault("GLOG_v", "3")
# Threads of OpenMP that wait sleep instead of spinning: MindSpore calls kernels from several threads, each of which has a team of its own,
# and the teams would spin against each other. Read when MindSpore is imported, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
