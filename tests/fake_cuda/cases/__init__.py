"""Cases on the stand-in, a module per topic: functions `case_<what>(fake)`. test_fake_cuda.py makes each of them a test."""
