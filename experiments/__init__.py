import os

# MindSpore warns of every function that is compiled for a second shape; errors still show. Set GLOG_v=2 to see warnings.
os.environ.setdefault("GLOG_v", "3")
