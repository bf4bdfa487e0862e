"""Memory of ours as a DLPack capsule: one dimension of uint8, writable, without a copy."""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t

from mxcore.memory.dlpack cimport Bytes, DLManagedTensor, DLManagedTensorVersioned, DLTensor

cdef enum:
    DL_UINT = 1


cdef struct Shared:
    int64_t shape
    int64_t stride
    size_t* export_count

cdef struct Legacy:
    DLManagedTensor managed  # first: the capsule's pointer is that of the whole
    Shared shared

cdef struct Versioned:
    DLManagedTensorVersioned managed
    Shared shared


cdef void fill_tensor(DLTensor* tensor, const Bytes* what, Shared* shared) noexcept:
    shared.shape = what.size_bytes
    shared.stride = 1
    shared.export_count = what.export_count
    tensor.data = what.data
    tensor.device.device_type = what.device_type
    tensor.device.device_id = what.device_id
    tensor.ndim = 1
    tensor.dtype.code = DL_UINT
    tensor.dtype.bits = 8
    tensor.dtype.lanes = 1
    tensor.shape = &shared.shape
    tensor.strides = &shared.stride
    tensor.byte_offset = 0


cdef void end_export(void* owner, Shared* shared) noexcept:
    """Gives back the reference that an export holds; that may free the memory."""
    shared.export_count[0] -= 1
    Py_DECREF(<object>owner)


cdef void delete_legacy(DLManagedTensor* managed) noexcept with gil:
    end_export(managed.manager_ctx, &(<Legacy*>managed).shared)
    PyMem_Free(managed)


cdef void delete_versioned(DLManagedTensorVersioned* managed) noexcept with gil:
    end_export(managed.manager_ctx, &(<Versioned*>managed).shared)
    PyMem_Free(managed)


cdef void drop_legacy(object capsule) noexcept:
    """A capsule that nobody consumed (a consumer renames it) deletes what it holds."""
    cdef DLManagedTensor* managed
    if PyCapsule_IsValid(capsule, "dltensor"):
        managed = <DLManagedTensor*>PyCapsule_GetPointer(capsule, "dltensor")
        managed.deleter(managed)


cdef void drop_versioned(object capsule) noexcept:
    cdef DLManagedTensorVersioned* managed
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        managed = <DLManagedTensorVersioned*>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        managed.deleter(managed)


cdef object capsule_of(void* export, object owner, Bytes* what, const char* name, void (*drop)(object) noexcept):
    """`export` is freed if the capsule cannot be made; otherwise it holds the owner from here on."""
    try:
        capsule = PyCapsule_New(export, name, drop)
    except BaseException:
        PyMem_Free(export)
        raise
    Py_INCREF(owner)
    what.export_count[0] += 1
    return capsule


cdef object export_bytes(object owner, Bytes* what, object max_version):
    cdef Versioned* versioned
    cdef Legacy* legacy
    if max_version is not None and max_version[0] >= 1:
        versioned = <Versioned*>PyMem_Malloc(sizeof(Versioned))
        if versioned == NULL:
            raise MemoryError
        fill_tensor(&versioned.managed.dl_tensor, what, &versioned.shared)
        versioned.managed.major = 1
        versioned.managed.minor = 0
        versioned.managed.flags = 0  # writable, no copy
        versioned.managed.manager_ctx = <void*>owner
        versioned.managed.deleter = delete_versioned
        return capsule_of(versioned, owner, what, "dltensor_versioned", <void (*)(object) noexcept>drop_versioned)
    legacy = <Legacy*>PyMem_Malloc(sizeof(Legacy))
    if legacy == NULL:
        raise MemoryError
    fill_tensor(&legacy.managed.dl_tensor, what, &legacy.shared)
    legacy.managed.manager_ctx = <void*>owner
    legacy.managed.deleter = delete_legacy
    return capsule_of(legacy, owner, what, "dltensor", <void (*)(object) noexcept>drop_legacy)
