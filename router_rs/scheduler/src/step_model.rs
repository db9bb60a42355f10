//! What an engine step takes.

/// Predicted time of an engine step in milliseconds:
/// `a + b n + c Σ(n context) + d B + e Σ(decode context)`, with n prefill
/// tokens and B decoding requests in the step. All coefficients are at least
/// zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepModel {
    /// Constant, ms.
    pub a_ms: f64,
    /// ms a prefill token.
    pub b_ms: f64,
    /// ms a (prefill token x context token).
    pub c_ms: f64,
    /// ms a decoding request.
    pub d_ms: f64,
    /// ms a context token of a decoding request.
    pub e_ms: f64,
    /// Relative standard error of a prediction.
    pub relative_error: f64,
    /// Chunk at which prefill runs at full rate, in tokens.
    pub saturating_chunk: u32,
}

impl Default for StepModel {
    /// For a worker that has not measured itself: a small model on a few
    /// cores, with a wide error bar.
    fn default() -> Self {
        Self {
            a_ms: 5.0,
            b_ms: 1.0,
            c_ms: 1e-4,
            d_ms: 5.0,
            e_ms: 0.01,
            relative_error: 1.0,
            saturating_chunk: 256,
        }
    }
}

impl StepModel {
    /// A step with these contents.
    pub fn step_ms(&self, prefill: u64, prefill_context: u64, batch: u32, context: u64) -> f64 {
        self.a_ms
            + self.b_ms * prefill as f64
            + self.c_ms * prefill_context as f64
            + self.d_ms * f64::from(batch)
            + self.e_ms * context as f64
    }

    /// Computing `tokens` prompt tokens after `cached` ones, in chunks of
    /// `saturating_chunk`, alone on the worker.
    pub fn prefill_ms(&self, cached: u64, tokens: u64) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let chunk = u64::from(self.saturating_chunk.max(1));
        let steps = tokens.div_ceil(chunk);
        self.a_ms * steps as f64 + self.tokens_ms(tokens as f64, prefill_context(cached, tokens))
    }

    /// What prompt tokens add to the steps that hold them.
    pub(crate) fn tokens_ms(&self, tokens: f64, context: f64) -> f64 {
        self.b_ms * tokens + self.c_ms * context
    }

    /// A step that only decodes.
    pub fn decode_ms(&self, batch: u32, context: u64) -> f64 {
        self.step_ms(0, 0, batch, context)
    }
}

/// Sum of the context lengths of `tokens` prompt tokens after `cached` ones:
/// Σ(n·context), in whatever chunks they are computed.
pub fn prefill_context(cached: u64, tokens: u64) -> f64 {
    let (cached, tokens) = (cached as f64, tokens as f64);
    tokens * cached + tokens * (tokens + 1.0) / 2.0
}
