/* Sequence: allocates tensors and launches kernels in one call from Python; operators/sequence.py
   documents it and has its twin in Python. Backward: the callable that autograd calls. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_TENSORS = 16, MAX_LAUNCHES = 4, MAX_PARAMETERS = 48 };

typedef CUresult (*LaunchKernelEx)(const CUlaunchConfig *, CUfunction, void **, void **);

typedef struct {
    CUfunction function;
    unsigned int grid, threads, shared_bytes;
    int dependent, parameters;
    int tensor[MAX_PARAMETERS];        /* the tensor whose address it is, or -1: */
    uint64_t constant[MAX_PARAMETERS]; /* then its value */
} Launch;

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    int n_inputs, n_empty, launches, results;
    PyObject *make_empty;             /* called with each tuple of `empty` */
    PyObject *empty[MAX_TENSORS];
    Launch launch[MAX_LAUNCHES];
    int result[MAX_TENSORS];
    PyObject *address;                /* torch.Tensor.data_ptr */
    PyObject *current_device, *current_stream, *device;
    long device_index;
    PyObject *twin;                   /* the fallback */
    LaunchKernelEx launch_kernel_ex;
} Sequence;

/* Store the non-negative integer that a callable returns; -1, with an error set, if it fails. */
static long long integer_of(PyObject *callable, PyObject *argument, uint64_t *value) {
    PyObject *result =
        argument ? PyObject_CallOneArg(callable, argument) : PyObject_CallNoArgs(callable);
    if (!result) return -1;
    *value = PyLong_AsUnsignedLongLongMask(result);
    Py_DECREF(result);
    return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static CUresult launch_all(Sequence *self, CUstream stream, uint64_t *addresses, int *done) {
    for (*done = 0; *done < self->launches; ++*done) {
        Launch *launch = &self->launch[*done];
        void *parameters[MAX_PARAMETERS];
        for (int i = 0; i < launch->parameters; ++i) {
            int tensor = launch->tensor[i];
            parameters[i] = tensor < 0 ? (void *)&launch->constant[i] : (void *)&addresses[tensor];
        }
        CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
        attribute.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig config = {0};
        config.gridDimX = launch->grid;
        config.gridDimY = config.gridDimZ = 1;
        config.blockDimX = launch->threads;
        config.blockDimY = config.blockDimZ = 1;
        config.sharedMemBytes = launch->shared_bytes;
        config.hStream = stream;
        config.attrs = &attribute;
        config.numAttrs = launch->dependent ? 1 : 0;
        CUresult status = self->launch_kernel_ex(&config, launch->function, parameters, NULL);
        if (status != CUDA_SUCCESS) return status;
    }
    return CUDA_SUCCESS;
}

static PyObject *sequence_call(
    PyObject *object, PyObject *const *inputs, size_t flags, PyObject *names
) {
    Sequence *self = (Sequence *)object;
    if (PyVectorcall_NARGS(flags) != self->n_inputs || (names && PyTuple_GET_SIZE(names))) {
        PyErr_Format(PyExc_TypeError, "a sequence takes %d tensors, by position", self->n_inputs);
        return NULL;
    }
    uint64_t current;
    if (integer_of(self->current_device, NULL, &current)) return NULL;
    if ((long)current != self->device_index)
        return PyObject_Vectorcall(self->twin, inputs, self->n_inputs, NULL);

    PyObject *tensors[MAX_TENSORS], *result = NULL;
    uint64_t addresses[MAX_TENSORS], stream;
    int held = 0;
    for (; held < self->n_inputs; ++held) tensors[held] = Py_NewRef(inputs[held]);
    for (int i = 0; i < self->n_empty; ++i, ++held) {
        tensors[held] = PyObject_Call(self->make_empty, self->empty[i], NULL);
        if (!tensors[held]) goto end;
    }
    for (int i = 0; i < held; ++i)
        if (integer_of(self->address, tensors[i], &addresses[i])) goto end;
    if (integer_of(self->current_stream, self->device, &stream)) goto end;

    int done;
    CUresult status;
    Py_BEGIN_ALLOW_THREADS
    status = launch_all(self, (CUstream)(uintptr_t)stream, addresses, &done);
    Py_END_ALLOW_THREADS
    if (status == CUDA_ERROR_INVALID_CONTEXT && done == 0) {
        /* A new thread: Triton's own launcher makes the context current. */
        result = PyObject_Vectorcall(self->twin, inputs, self->n_inputs, NULL);
        goto end;
    }
    if (status != CUDA_SUCCESS) {
        PyErr_Format(
            PyExc_RuntimeError,
            "CUDA error %d from launch %d of %d (an earlier kernel may have failed: "
            "CUDA_LAUNCH_BLOCKING=1 shows where)",
            (int)status, done + 1, self->launches
        );
        goto end;
    }
    if (self->results == 1) {
        result = Py_NewRef(tensors[self->result[0]]);
        goto end;
    }
    result = PyTuple_New(self->results);
    for (int i = 0; result && i < self->results; ++i)
        PyTuple_SET_ITEM(result, i, Py_NewRef(tensors[self->result[i]]));
end:
    for (int i = 0; i < held; ++i) Py_DECREF(tensors[i]);
    return result;
}

static int read_launch(Launch *launch, PyObject *spec, int tensors) {
    unsigned long long function;
    PyObject *parameters;
    if (!PyArg_ParseTuple(
            spec, "KIIIpO!", &function, &launch->grid, &launch->threads,
            &launch->shared_bytes, &launch->dependent, &PyTuple_Type, &parameters
        ))
        return -1;
    launch->function = (CUfunction)(uintptr_t)function;
    launch->parameters = (int)PyTuple_GET_SIZE(parameters);
    if (launch->parameters > MAX_PARAMETERS) {
        PyErr_SetString(PyExc_ValueError, "too many parameters");
        return -1;
    }
    for (int i = 0; i < launch->parameters; ++i) {
        unsigned long long constant;
        PyObject *one = PyTuple_GET_ITEM(parameters, i);
        if (!PyArg_ParseTuple(one, "iK", &launch->tensor[i], &constant)) return -1;
        launch->constant[i] = constant;
        if (launch->tensor[i] >= tensors) {
            PyErr_SetString(PyExc_ValueError, "tensor number out of range");
            return -1;
        }
    }
    return 0;
}

static void sequence_free(PyObject *object) {
    Sequence *self = (Sequence *)object;
    for (int i = 0; i < self->n_empty; ++i) Py_XDECREF(self->empty[i]);
    Py_XDECREF(self->make_empty);
    Py_XDECREF(self->address);
    Py_XDECREF(self->current_device);
    Py_XDECREF(self->current_stream);
    Py_XDECREF(self->device);
    Py_XDECREF(self->twin);
    Py_TYPE(object)->tp_free(object);
}

static PyObject *sequence_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    int n_inputs;
    unsigned long long launch_kernel_ex;
    PyObject *make_empty, *empty, *launches, *results, *address, *current_device, *current_stream;
    PyObject *device, *twin;
    if (!PyArg_ParseTuple(
            args, "iOO!O!O!OOOOOK", &n_inputs, &make_empty, &PyTuple_Type, &empty, &PyTuple_Type,
            &launches, &PyTuple_Type, &results, &address, &current_device, &current_stream, &device,
            &twin, &launch_kernel_ex
        ))
        return NULL;
    Py_ssize_t tensors = n_inputs + PyTuple_GET_SIZE(empty);
    if (n_inputs < 1 || tensors > MAX_TENSORS || PyTuple_GET_SIZE(launches) > MAX_LAUNCHES ||
        PyTuple_GET_SIZE(results) < 1 || PyTuple_GET_SIZE(results) > MAX_TENSORS) {
        PyErr_SetString(PyExc_ValueError, "too many tensors, launches or results, or none");
        return NULL;
    }
    Sequence *self = (Sequence *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->call = sequence_call;
    self->n_inputs = n_inputs;
    self->make_empty = Py_NewRef(make_empty);
    self->address = Py_NewRef(address);
    self->current_device = Py_NewRef(current_device);
    self->current_stream = Py_NewRef(current_stream);
    self->device = Py_NewRef(device);
    self->twin = Py_NewRef(twin);
    self->launch_kernel_ex = (LaunchKernelEx)(uintptr_t)launch_kernel_ex;
    self->device_index = PyLong_AsLong(device);
    if (PyErr_Occurred()) goto failed;
    for (; self->n_empty < PyTuple_GET_SIZE(empty); ++self->n_empty)
        self->empty[self->n_empty] = Py_NewRef(PyTuple_GET_ITEM(empty, self->n_empty));
    for (; self->launches < PyTuple_GET_SIZE(launches); ++self->launches) {
        PyObject *spec = PyTuple_GET_ITEM(launches, self->launches);
        if (read_launch(&self->launch[self->launches], spec, (int)tensors)) goto failed;
    }
    for (; self->results < PyTuple_GET_SIZE(results); ++self->results) {
        long at = PyLong_AsLong(PyTuple_GET_ITEM(results, self->results));
        if (PyErr_Occurred()) goto failed;
        if (at < 0 || at >= tensors) {
            PyErr_SetString(PyExc_ValueError, "tensor number out of range");
            goto failed;
        }
        self->result[self->results] = (int)at;
    }
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

static PyTypeObject SequenceType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "onelaunch_sequence.Sequence",
    .tp_basicsize = sizeof(Sequence),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Sequence, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = sequence_new,
    .tp_dealloc = sequence_free,
};

/* The `apply` of an autograd.Function's node. Its context has saved x and a weight, and has
   `prepared`, whose `recent_backward` has entries (guard, whether dW is needed, function). Called
   with the context and dY, it returns the two gradients of the first function whose guard matches,
   and None. If none matches, gradients are recorded, or a dispatch mode is on, it returns
   `fallback(context, dY, x, weight)`: the saved tensors may be unpacked only once. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *grad_enabled, *dispatch_modes, *address, *fallback;
} Backward;

static PyObject *name_prepared, *name_recent, *name_saved, *name_needed;

/* 1 if an entry of `recent` matches, with its function's result in *result; 0 if not; -1: error. */
static int try_recent(
    Backward *self, PyObject *recent, PyObject *needed, PyObject *const *tensors, PyObject **result
) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(recent); ++i) {
        PyObject *one = PyTuple_GET_ITEM(recent, i);
        if (!PyTuple_Check(one) || PyTuple_GET_SIZE(one) != 3) return 0;
        if (PyTuple_GET_ITEM(one, 1) != needed) continue;
        PyObject *match = PyObject_Vectorcall(PyTuple_GET_ITEM(one, 0), tensors, 3, NULL);
        if (!match) return -1;
        int fits = match == Py_True;
        Py_DECREF(match);
        if (!fits) continue;
        uint64_t bits = 0, address;
        for (int t = 0; t < 3; ++t, bits |= address)
            if (integer_of(self->address, tensors[t], &address)) return -1;
        if (bits & 15) continue; /* the guards do not compare addresses */
        *result = PyObject_Vectorcall(PyTuple_GET_ITEM(one, 2), tensors, 3, NULL);
        return *result ? 1 : -1;
    }
    return 0;
}

static PyObject *backward_call(
    PyObject *object, PyObject *const *args, size_t flags, PyObject *names
) {
    Backward *self = (Backward *)object;
    PyObject *prepared = NULL, *recent = NULL, *needed = NULL, *both = NULL, *result = NULL;
    int fits = 0;
    if (PyVectorcall_NARGS(flags) != 2 || names) {
        PyErr_SetString(PyExc_TypeError, "takes a context and a gradient, by position");
        return NULL;
    }
    PyObject *saved = PyObject_GetAttr(args[0], name_saved);
    if (!saved) return NULL;
    if (!PyTuple_Check(saved) || PyTuple_GET_SIZE(saved) != 2) {
        PyErr_SetString(PyExc_TypeError, "the context must save a tensor and a weight");
        goto end;
    }
    PyObject *x = PyTuple_GET_ITEM(saved, 0), *weight = PyTuple_GET_ITEM(saved, 1);
    PyObject *recorded = PyObject_CallNoArgs(self->grad_enabled);
    if (!recorded) goto end;
    Py_DECREF(recorded);
    uint64_t modes;
    if (integer_of(self->dispatch_modes, NULL, &modes)) goto end;
    if (recorded != Py_False || modes || weight == Py_None) goto fallback;
    if (!(prepared = PyObject_GetAttr(args[0], name_prepared))) goto end;
    if (!(recent = PyObject_GetAttr(prepared, name_recent))) goto end;
    if (!(needed = PyObject_GetAttr(args[0], name_needed))) goto end;
    if (!PyTuple_Check(recent) || !PyTuple_Check(needed) || PyTuple_GET_SIZE(needed) < 2)
        goto fallback;
    PyObject *tensors[] = {args[1], x, weight};
    fits = try_recent(self, recent, PyTuple_GET_ITEM(needed, 1), tensors, &both);
    if (fits < 0) goto end;
    if (fits && PyTuple_Check(both) && PyTuple_GET_SIZE(both) == 2) {
        result = PyTuple_Pack(3, PyTuple_GET_ITEM(both, 0), PyTuple_GET_ITEM(both, 1), Py_None);
        goto end;
    }
fallback:;
    PyObject *all[] = {args[0], args[1], x, weight};
    result = PyObject_Vectorcall(self->fallback, all, 4, NULL);
end:
    Py_XDECREF(prepared);
    Py_XDECREF(recent);
    Py_DECREF(saved);
    Py_XDECREF(needed);
    Py_XDECREF(both);
    return result;
}

static PyObject *backward_bind(PyObject *self, PyObject *object, PyObject *type) {
    return object ? PyMethod_New(self, object) : Py_NewRef(self);
}

static void backward_free(PyObject *object) {
    Backward *self = (Backward *)object;
    Py_XDECREF(self->grad_enabled);
    Py_XDECREF(self->dispatch_modes);
    Py_XDECREF(self->address);
    Py_XDECREF(self->fallback);
    Py_TYPE(object)->tp_free(object);
}

static PyObject *backward_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    PyObject *grad_enabled, *dispatch_modes, *address, *fallback;
    if (!PyArg_ParseTuple(args, "OOOO", &grad_enabled, &dispatch_modes, &address, &fallback))
        return NULL;
    Backward *self = (Backward *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->call = backward_call;
    self->grad_enabled = Py_NewRef(grad_enabled);
    self->dispatch_modes = Py_NewRef(dispatch_modes);
    self->address = Py_NewRef(address);
    self->fallback = Py_NewRef(fallback);
    return (PyObject *)self;
}

static PyTypeObject BackwardType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "onelaunch_sequence.Backward",
    .tp_basicsize = sizeof(Backward),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Backward, call),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = backward_bind,
    .tp_new = backward_new,
    .tp_dealloc = backward_free,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "onelaunch_sequence", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_onelaunch_sequence(void) {
    if (PyType_Ready(&SequenceType) < 0 || PyType_Ready(&BackwardType) < 0) return NULL;
    name_prepared = PyUnicode_InternFromString("prepared");
    name_recent = PyUnicode_InternFromString("recent_backward");
    name_saved = PyUnicode_InternFromString("saved_tensors");
    name_needed = PyUnicode_InternFromString("needs_input_grad");
    if (!name_prepared || !name_recent || !name_saved || !name_needed) return NULL;
    PyObject *extension = PyModule_Create(&module);
    if (extension &&
        (PyModule_AddObjectRef(extension, "Sequence", (PyObject *)&SequenceType) < 0 ||
         PyModule_AddObjectRef(extension, "Backward", (PyObject *)&BackwardType) < 0)) {
        Py_DECREF(extension);
        return NULL;
    }
    return extension;
}
