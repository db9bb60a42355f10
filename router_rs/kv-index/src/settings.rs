//! What bounds an index, and how full one is.

/// Bounds of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexSettings {
    /// Most bytes that blocks and their holders may take, both copies
    /// together. Above it the blocks that were longest not asked for go.
    pub max_bytes: usize,
    /// Most workers at a time.
    pub max_workers: usize,
}

impl Default for IndexSettings {
    /// 1 GiB: some 25 million blocks.
    fn default() -> Self {
        Self {
            max_bytes: 1 << 30,
            max_workers: 4096,
        }
    }
}

/// How full an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexStats {
    /// Workers.
    pub workers: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// (worker, block, tier) triples.
    pub entries: u64,
    /// Distinct sets of holders.
    pub holder_sets: usize,
    /// Bytes taken, both copies and what approximate workers need.
    pub bytes: usize,
    /// Blocks that went because of the bound, since the start.
    pub evicted: u64,
}
