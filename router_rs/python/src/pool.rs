//! `KvPool`: the pool as Python sees it.

use std::{
    ffi::{c_int, c_void},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kvmesh_transfer::{KvPool, PoolError};
use pyo3::{
    exceptions::{PyBufferError, PyIndexError, PyOSError, PyValueError},
    ffi,
    prelude::*,
};

/// Block slots in a sealed shared mapping (memfd).
#[pyclass(name = "KvPool", module = "kvmesh._router", frozen)]
pub(crate) struct PyKvPool {
    /// Held until the object dies, closed or not: torch gives its view back
    /// at once and from then on counts on the object alone.
    pool: Arc<KvPool>,
    closed: AtomicBool,
}

fn to_python(error: PoolError) -> PyErr {
    match error {
        PoolError::Size { .. } => PyValueError::new_err(error.to_string()),
        PoolError::Slot { .. } => PyIndexError::new_err(error.to_string()),
        PoolError::Os { what, source } => match source.raw_os_error() {
            Some(code) => PyOSError::new_err((code, format!("{what}: {source}"))),
            None => PyOSError::new_err(format!("{what}: {source}")),
        },
        PoolError::Foreign(_) | PoolError::Uid(_) => PyOSError::new_err(error.to_string()),
    }
}

impl PyKvPool {
    /// The pool, for a new user of it.
    pub(crate) fn open(&self) -> PyResult<&Arc<KvPool>> {
        if self.closed.load(Ordering::Acquire) {
            return Err(PyValueError::new_err("the pool is closed"));
        }
        Ok(&self.pool)
    }
}

#[pymethods]
impl PyKvPool {
    #[new]
    #[pyo3(signature = (blocks, block_bytes, *, populate=false, huge_pages=true))]
    fn new(
        py: Python<'_>,
        blocks: u64,
        block_bytes: u64,
        populate: bool,
        huge_pages: bool,
    ) -> PyResult<Self> {
        let pool = py
            .detach(|| KvPool::with_pages(blocks, block_bytes, populate, huge_pages))
            .map_err(to_python)?;
        Ok(Self {
            pool: Arc::new(pool),
            closed: AtomicBool::new(false),
        })
    }

    #[getter]
    fn blocks(&self) -> u32 {
        self.pool.blocks()
    }

    #[getter]
    fn block_bytes(&self) -> usize {
        self.pool.block_bytes()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.pool.bytes()
    }

    /// Bytes in huge pages, bytes that the kernel refused to make huge, and why.
    fn huge_use(&self) -> (usize, usize, String) {
        let used = self.pool.huge();
        (used.bytes, used.refused_bytes, used.refusal)
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn slot_version(&self, slot: u32) -> PyResult<u64> {
        self.pool.version(slot).map_err(to_python)
    }

    fn raise_versions(&self, py: Python<'_>, slots: Vec<u32>) -> PyResult<()> {
        py.detach(|| self.pool.raise(&slots)).map_err(to_python)
    }

    fn populate(&self, py: Python<'_>, first: u32, count: u32) -> PyResult<()> {
        let slots = first..first.saturating_add(count);
        py.detach(|| self.pool.populate(slots)).map_err(to_python)
    }

    fn checksum(&self, py: Python<'_>, slot: u32) -> PyResult<u64> {
        py.detach(|| self.pool.checksum(slot)).map_err(to_python)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// # Safety
    ///
    /// Called by the interpreter with a buffer to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let pool = slf
            .get()
            .open()
            .map_err(|_| PyBufferError::new_err("the pool is closed"))?;
        let len = ffi::Py_ssize_t::try_from(pool.bytes())
            .map_err(|_| PyBufferError::new_err("too large for a view"))?;
        let data = pool.data().cast::<c_void>();
        // SAFETY: `view` is the interpreter's to fill; the memory lives as
        // long as the object, to which the view takes a reference.
        let rc = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), data, len, 0, flags) };
        if rc < 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }

    /// # Safety
    ///
    /// Called by the interpreter with a buffer that `__getbuffer__` filled.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}
