import logging

# bitsandbytes, where it is installed beside a CPU, says at import that it lacks a kernel which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
