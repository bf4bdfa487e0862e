"""The descriptor pool of our stubs, separate from protobuf's default pool.

Another package in the same process (the PyPI `modelexpress`) may describe the same message names; in one
pool the second import would fail with "duplicate symbol".
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
