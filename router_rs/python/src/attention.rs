//! `PagedKv`: attention kernels over a KV pool's memory.

use kvmesh_attention::{DecodeHead, ROWS, Scratch, rotate};
use pyo3::{
    buffer::{Element, PyBuffer},
    exceptions::{PyIndexError, PyValueError},
    prelude::*,
};

/// float32 K and V in blocks of a pool, in the layout of KvCompatibility.format 1.
///
/// Within a block layer-major; for each layer K then V, each
/// `[kv_heads, block_tokens, head_size]`.
#[pyclass(name = "PagedKv", module = "kvmesh._router", frozen)]
pub(crate) struct PyPagedKv {
    /// Keeps the memory mapped and where it is.
    pool: PyBuffer<u8>,
    blocks: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    block_tokens: usize,
    head_size: usize,
}

/// Elements of a buffer, usable without the GIL.
///
/// Holding it says nothing about other users of the memory: see `slice`.
#[derive(Clone, Copy)]
struct Raw<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: an address and a length; what may be done with them is said where
// they become a slice.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Raw<T> {}

impl<T: Element> Raw<T> {
    fn of(buffer: &PyBuffer<T>, name: &str, writable: bool) -> PyResult<Self> {
        if !buffer.is_c_contiguous() || (writable && buffer.readonly()) {
            return Err(PyValueError::new_err(format!(
                "{name} must be contiguous{}",
                if writable { " and writable" } else { "" }
            )));
        }
        Ok(Self {
            data: buffer.buf_ptr().cast(),
            len: buffer.item_count(),
        })
    }

    fn need(self, name: &str, len: usize) -> PyResult<Self> {
        if self.len < len {
            let have = self.len;
            return Err(PyValueError::new_err(format!(
                "{name} has {have} elements, {len} are needed"
            )));
        }
        Ok(self)
    }

    /// # Safety
    ///
    /// The buffer is alive, and nobody writes to it while the slice lives.
    unsafe fn slice<'a>(self) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: an exporter's buffer is valid for its length and aligned for
        // its type (PyBuffer::get checks); the caller promises the rest.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }

    /// # Safety
    ///
    /// The buffer is alive, `begin + len` lies in it, and nobody writes to that
    /// part while the slice lives.
    unsafe fn part<'a>(self, begin: usize, len: usize) -> &'a [T] {
        debug_assert!(begin + len <= self.len);
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts(self.data.add(begin), len) }
    }

    /// # Safety
    ///
    /// The buffer is alive, `begin + len` lies in it, and nobody else reads or
    /// writes that part while the slice lives.
    unsafe fn part_mut<'a>(self, begin: usize, len: usize) -> &'a mut [T] {
        debug_assert!(begin + len <= self.len);
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(begin), len) }
    }
}

#[pymethods]
impl PyPagedKv {
    #[new]
    #[pyo3(signature = (pool, *, layers, heads, kv_heads, block_tokens, head_size))]
    fn new(
        pool: PyBuffer<u8>,
        layers: usize,
        heads: usize,
        kv_heads: usize,
        block_tokens: usize,
        head_size: usize,
    ) -> PyResult<Self> {
        let sizes = [layers, heads, kv_heads, block_tokens, head_size];
        let odd = !head_size.is_multiple_of(2) || kv_heads == 0 || !heads.is_multiple_of(kv_heads);
        let block = [layers, 2, kv_heads, block_tokens, head_size, 4]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        let Some(block) = block.filter(|_| !sizes.contains(&0) && !odd) else {
            return Err(PyValueError::new_err("sizes do not make a block"));
        };
        Raw::of(&pool, "pool", true)?;
        if !pool.buf_ptr().cast::<f32>().is_aligned() {
            return Err(PyValueError::new_err("pool is not aligned for float32"));
        }
        let blocks = pool.len_bytes() / block;
        Ok(Self {
            pool,
            blocks,
            layers,
            heads,
            kv_heads,
            block_tokens,
            head_size,
        })
    }

    /// Rotates q and k of `rows` tokens; q goes to `q_out`, k and v into blocks.
    #[allow(clippy::too_many_arguments)]
    fn write(
        &self,
        py: Python<'_>,
        layer: usize,
        qkv: PyBuffer<f32>,
        cos: PyBuffer<f32>,
        sin: PyBuffer<f32>,
        slots: PyBuffer<i64>,
        q_out: PyBuffer<f32>,
    ) -> PyResult<()> {
        let rows = slots.item_count();
        let half = self.head_size / 2;
        let width = (self.heads + 2 * self.kv_heads) * self.head_size;
        let q_width = self.heads * self.head_size;
        self.check_layer(layer)?;
        let slots = Raw::of(&slots, "slots", false)?;
        let qkv = Raw::of(&qkv, "qkv", false)?.need("qkv", rows * width)?;
        let cos = Raw::of(&cos, "cos", false)?.need("cos", rows * half)?;
        let sin = Raw::of(&sin, "sin", false)?.need("sin", rows * half)?;
        let q_out = Raw::of(&q_out, "q_out", true)?.need("q_out", rows * q_width)?;
        // SAFETY: the buffers live until this function returns; they are the
        // runner's own work space, which one thread uses at a time.
        let (slots, qkv, cos, sin, q_out) = unsafe {
            (
                slots.slice(),
                qkv.slice(),
                cos.slice(),
                sin.slice(),
                q_out.part_mut(0, rows * q_width),
            )
        };
        let slots = self.check_slots(slots)?;
        let pool = self.floats();
        py.detach(|| {
            let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
            let tokens = qkv.chunks_exact(width).zip(q_out.chunks_exact_mut(q_width));
            for ((slot, (cos, sin)), (qkv, q_out)) in slots.iter().zip(angles).zip(tokens) {
                let (q, kv) = qkv.split_at(q_width);
                let (k, v) = kv.split_at(self.kv_heads * self.head_size);
                let heads = q.chunks_exact(self.head_size);
                for (head, out) in heads.zip(q_out.chunks_exact_mut(self.head_size)) {
                    rotate(head, cos, sin, out);
                }
                let k = k.chunks_exact(self.head_size);
                let v = v.chunks_exact(self.head_size);
                for (kv_head, (k, v)) in k.zip(v).enumerate() {
                    let offset = (*slot % self.block_tokens) * self.head_size;
                    let block = *slot / self.block_tokens;
                    let k_at = self.part(block, layer, kv_head, 0) + offset;
                    let v_at = self.part(block, layer, kv_head, 1) + offset;
                    // SAFETY: slots are checked, so the parts lie in the pool;
                    // the token's place in a block is written by this sequence
                    // alone, and read by others only once it is announced.
                    let (k_out, v_out) = unsafe {
                        (
                            pool.part_mut(k_at, self.head_size),
                            pool.part_mut(v_at, self.head_size),
                        )
                    };
                    rotate(k, cos, sin, k_out);
                    v_out.copy_from_slice(v);
                }
            }
        });
        Ok(())
    }

    /// Attention of single tokens: row `rows[i]` of `q` over `lengths[i]` tokens
    /// in the blocks `tables[begins[i]..]`, into the same row of `out`.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (layer, q, rows, begins, tables, lengths, out, *, threads=1))]
    fn attend(
        &self,
        py: Python<'_>,
        layer: usize,
        q: PyBuffer<f32>,
        rows: PyBuffer<u32>,
        begins: PyBuffer<u32>,
        tables: PyBuffer<u32>,
        lengths: PyBuffer<u32>,
        out: PyBuffer<f32>,
        threads: usize,
    ) -> PyResult<()> {
        self.check_layer(layer)?;
        let width = self.heads * self.head_size;
        let out = Raw::of(&out, "out", true)?;
        // SAFETY: the buffers live until this function returns; they are the
        // runner's own work space, which one thread uses at a time.
        let (q, rows, begins, tables, lengths) = unsafe {
            (
                Raw::of(&q, "q", false)?.slice(),
                Raw::of(&rows, "rows", false)?.slice(),
                Raw::of(&begins, "begins", false)?.slice(),
                Raw::of(&tables, "tables", false)?.slice(),
                Raw::of(&lengths, "lengths", false)?.slice(),
            )
        };
        if begins.len() != rows.len() || lengths.len() != rows.len() {
            return Err(PyValueError::new_err(
                "rows, begins and lengths differ in length",
            ));
        }
        if !rows.is_sorted_by(|a, b| a < b) {
            return Err(PyValueError::new_err("rows must rise"));
        }
        let mut sequences = Vec::with_capacity(rows.len());
        for ((row, begin), length) in rows.iter().zip(begins).zip(lengths) {
            let (row, begin, length) = (*row as usize, *begin as usize, *length as usize);
            let table = tables.get(begin..begin + length.div_ceil(self.block_tokens));
            let (Some(table), true) = (table, length > 0) else {
                return Err(PyValueError::new_err(
                    "a table is too short, or a length is 0",
                ));
            };
            if table.iter().any(|block| *block as usize >= self.blocks) {
                return Err(PyIndexError::new_err("no such block in the pool"));
            }
            let queries = q.get(row * width..(row + 1) * width);
            let (Some(queries), true) = (queries, out.len >= (row + 1) * width) else {
                return Err(PyIndexError::new_err("no such row"));
            };
            sequences.push(Sequence {
                queries,
                table,
                length,
                out: row * width,
            });
        }
        py.detach(|| self.attend_all(layer, &sequences, out, threads));
        Ok(())
    }
}

/// One new token and where its sequence lies.
struct Sequence<'a> {
    queries: &'a [f32],
    table: &'a [u32],
    length: usize,
    /// Where its row of the result begins.
    out: usize,
}

/// Asks the processor to fetch `len` floats from `begin` on.
///
/// A block's part for a head is about one page, and the next block lies anywhere:
/// the processor's own prefetchers stop at the page's end and know no tables. So
/// each piece of the next block is on its way while the same piece of this one is
/// computed: not all at once, for the processor has room for a few lines only.
fn prefetch(pool: Raw<f32>, begin: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..len).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: an address is computed, nothing is read; a prefetch of any
        // address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pool.data.wrapping_add(begin + offset).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (pool, begin, len);
}

impl PyPagedKv {
    fn check_layer(&self, layer: usize) -> PyResult<()> {
        if layer < self.layers {
            return Ok(());
        }
        Err(PyIndexError::new_err("no such layer"))
    }

    /// Slots of tokens as unsigned, all of them in the pool.
    fn check_slots(&self, slots: &[i64]) -> PyResult<Vec<usize>> {
        let end = self.blocks * self.block_tokens;
        let checked = slots
            .iter()
            .map(|slot| usize::try_from(*slot).ok().filter(|slot| *slot < end))
            .collect::<Option<Vec<_>>>();
        checked.ok_or_else(|| PyIndexError::new_err("no such slot in the pool"))
    }

    fn floats(&self) -> Raw<f32> {
        Raw {
            data: self.pool.buf_ptr().cast(),
            len: self.pool.len_bytes() / 4,
        }
    }

    /// Where K (`which` 0) or V (1) of a KV head begins in a block, in floats.
    fn part(&self, block: usize, layer: usize, kv_head: usize, which: usize) -> usize {
        let head = self.block_tokens * self.head_size;
        (((block * self.layers + layer) * 2 + which) * self.kv_heads + kv_head) * head
    }

    fn attend_all(&self, layer: usize, sequences: &[Sequence<'_>], out: Raw<f32>, threads: usize) {
        let threads = threads.clamp(1, sequences.len().max(1));
        let run = |first: usize| {
            let mut scratch = Scratch::default();
            for sequence in sequences.iter().skip(first).step_by(threads) {
                for kv_head in 0..self.kv_heads {
                    self.attend_one(layer, kv_head, sequence, out, &mut scratch);
                }
            }
        };
        std::thread::scope(|scope| {
            for first in 1..threads {
                scope.spawn(move || run(first));
            }
            run(0);
        });
    }

    fn attend_one(
        &self,
        layer: usize,
        kv_head: usize,
        sequence: &Sequence<'_>,
        out: Raw<f32>,
        scratch: &mut Scratch,
    ) {
        let group = self.heads / self.kv_heads * self.head_size;
        let begin = kv_head * group;
        let pool = self.floats();
        let size = self.block_tokens * self.head_size;
        let blocks = sequence.table.iter().map(|block| {
            let k_at = self.part(*block as usize, layer, kv_head, 0);
            let v_at = self.part(*block as usize, layer, kv_head, 1);
            // SAFETY: the table is checked, so the parts lie in the pool; the
            // blocks of running sequences are written by the engine's thread
            // alone, which is here.
            unsafe { (pool.part(k_at, size), pool.part(v_at, size)) }
        });
        let pieces = self.block_tokens.div_ceil(ROWS);
        let ahead = |block: usize, piece: usize| {
            if let Some(next) = sequence.table.get(block + 1) {
                let begin = self.part(*next as usize, layer, kv_head, piece / pieces);
                let rows = ROWS * self.head_size;
                prefetch(pool, begin + piece % pieces * rows, rows);
            }
        };
        let head = DecodeHead {
            queries: &sequence.queries[begin..begin + group],
            head_size: self.head_size,
            block_tokens: self.block_tokens,
            length: sequence.length,
            scale: 1.0 / (self.head_size as f32).sqrt(),
        };
        // SAFETY: the row was checked to lie in `out`, and each row and head is
        // written once (rows rise).
        let out = unsafe { out.part_mut(sequence.out + begin, group) };
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: both features have just been found.
            return unsafe { kvmesh_attention::attend_avx2(head, blocks, ahead, scratch, out) };
        }
        kvmesh_attention::attend(head, blocks, ahead, scratch, out);
    }
}
