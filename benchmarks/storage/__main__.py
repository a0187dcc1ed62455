"""python -m benchmarks.storage"""

from benchmarks.storage.benchmark import main

main()
