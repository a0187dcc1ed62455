"""python -m benchmarks.gpu"""

from benchmarks.gpu.benchmark import main

main()
