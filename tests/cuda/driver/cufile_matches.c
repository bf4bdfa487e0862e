/* Compiles only if every function of our table has exactly the type that cufile.h declares for that symbol. */
#include <stdbool.h>

#include <cufile.h>

#define MX_WITH_CUDA_H 1
#define MX_WITH_CUFILE_H 1
#include "reading/cufile_library.h"

#define CHECK(member, symbol, result, arguments)                                                                  \
    _Static_assert(__builtin_types_compatible_p(__typeof__(&symbol), __typeof__(((mx_cufile_table *)0)->member)), \
                   #symbol " has another type in cufile.h");
MX_CUFILE_FUNCTIONS(CHECK)

_Static_assert((int)MX_CUFILE_DESCRIPTOR == (int)CU_FILE_HANDLE_TYPE_OPAQUE_FD, "");
_Static_assert((int)MX_CUFILE_CUDA_DRIVER_ERROR == (int)CU_FILE_CUDA_DRIVER_ERROR, "");
_Static_assert((int)MX_CUFILE_ALLOW_COMPAT_MODE == (int)CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE, "");
_Static_assert((int)MX_CUFILE_ALLOW_COMPAT_MODE == (int)CU_FILE_ALLOW_COMPAT_MODE, "");
_Static_assert(MX_CUFILE_POLLS == 1 << CU_FILE_USE_POLL_MODE, "");
