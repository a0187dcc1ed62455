"""python -m benchmarks.peers"""

from benchmarks.peers.benchmark import main

main()
