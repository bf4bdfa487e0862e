"""The descriptor pool of our stubs, apart from protobuf's default one.

Another package in the same process (the PyPI `modelexpress`) may describe the same message names; in one
pool the second import would fail with "duplicate symbol".
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
