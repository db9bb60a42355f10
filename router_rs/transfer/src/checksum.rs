//! XXH3-64 of a block, alone or in the same pass as its copy.
//!
//! The algorithm is XXH3 with seed 0 and the default secret (xxHash
//! specification 0.8). It is written out here for AVX2, for two reasons: a
//! copy must hash exactly the bytes that it stores, each read once, since the
//! source is foreign memory that may change at any time; and the wheel is
//! built for baseline x86-64, where a library that picks its vector width when
//! compiled has half the speed. Other machines take `xxhash-rust` over a small
//! buffer that lies in the cache.

use xxhash_rust::xxh3::Xxh3;

/// Bytes between two scrambles of the accumulators.
#[cfg(target_arch = "x86_64")]
const SCRAMBLE: usize = 1024;

/// Bytes that pass through the buffer at a time on machines without AVX2.
const BUFFER: usize = 8 * 1024;

/// XXH3-64 of `len` bytes at `source`.
///
/// # Safety
///
/// `source` must be readable for `len` bytes. They may change meanwhile; the
/// result is then that of no certain content.
#[must_use]
pub unsafe fn hash(source: *const u8, len: usize) -> u64 {
    let mut pass = Pass::new(len);
    // SAFETY: as promised by the caller.
    unsafe { pass.finish(source, std::ptr::null_mut()) }
}

/// Copies `len` bytes and returns the XXH3-64 of what was stored.
///
/// # Safety
///
/// `source` must be readable and `target` writable for `len` bytes; they must
/// not overlap. The source may change meanwhile: what is stored and what is
/// hashed are the same all the same.
#[must_use]
pub unsafe fn copy(source: *const u8, target: *mut u8, len: usize) -> u64 {
    let mut pass = Pass::new(len);
    // SAFETY: as promised by the caller.
    unsafe { pass.finish(source, target) }
}

/// A hash of bytes that come to lie in memory bit by bit, each part hashed
/// while it is still in the cache.
pub struct Pass {
    len: usize,
    done: usize,
    core: Core,
}

enum Core {
    #[cfg(target_arch = "x86_64")]
    Avx2([u64; 8]),
    Portable(Box<Xxh3>),
}

impl Pass {
    /// For `len` bytes in all.
    #[must_use]
    pub fn new(len: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if len > SCRAMBLE && is_x86_feature_detected!("avx2") {
            return Self {
                len,
                done: 0,
                core: Core::Avx2(avx2::START),
            };
        }
        Self {
            len,
            done: 0,
            core: Core::Portable(Box::new(Xxh3::new())),
        }
    }

    /// Hashes what is whole of the first `upto` bytes.
    ///
    /// # Safety
    ///
    /// `start` is the first of all `len` bytes, the same in each call; `upto`
    /// of them must be readable.
    pub unsafe fn advance(&mut self, start: *const u8, upto: usize) {
        let upto = upto.min(self.len);
        // SAFETY: `upto` bytes are readable, and nothing is stored.
        unsafe { self.run(start, std::ptr::null_mut(), upto) };
    }

    /// Handles the rest, and returns the hash of all.
    ///
    /// # Safety
    ///
    /// All `len` bytes at `start` must be readable and, where `target` is not
    /// null, the same number writable there; null stores nothing.
    unsafe fn finish(&mut self, start: *const u8, target: *mut u8) -> u64 {
        // SAFETY: as promised by the caller.
        unsafe { self.run(start, target, self.len) };
        match &mut self.core {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX2 was detected when this core was chosen; the rest
            // is shorter than what the caller promised.
            Core::Avx2(acc) => unsafe { avx2::finish(acc, start, target, self.done, self.len) },
            Core::Portable(hasher) => hasher.digest(),
        }
    }

    /// The hash, once all `len` bytes are there.
    ///
    /// # Safety
    ///
    /// All `len` bytes at `start` must be readable.
    #[must_use]
    pub unsafe fn end(mut self, start: *const u8) -> u64 {
        // SAFETY: as promised by the caller; nothing is stored.
        unsafe { self.finish(start, std::ptr::null_mut()) }
    }

    /// # Safety
    ///
    /// As `finish`, for `upto` bytes.
    unsafe fn run(&mut self, start: *const u8, target: *mut u8, upto: usize) {
        match &mut self.core {
            #[cfg(target_arch = "x86_64")]
            Core::Avx2(acc) => {
                // The last piece, even if whole, ends without a scramble.
                let whole = upto.min(self.len - 1) / SCRAMBLE * SCRAMBLE;
                if whole > self.done {
                    // SAFETY: AVX2 was detected; [done, whole) is inside.
                    unsafe { avx2::pieces(acc, start, target, self.done, whole) };
                    self.done = whole;
                }
            }
            Core::Portable(hasher) => {
                let mut buffer = [0_u8; BUFFER];
                while self.done < upto {
                    let n = BUFFER.min(upto - self.done);
                    // SAFETY: [done, done + n) lies inside `upto`; the
                    // buffer has room for n and overlaps nothing.
                    unsafe {
                        start
                            .add(self.done)
                            .copy_to_nonoverlapping(buffer.as_mut_ptr(), n);
                        if !target.is_null() {
                            target
                                .add(self.done)
                                .copy_from_nonoverlapping(buffer.as_ptr(), n);
                        }
                    }
                    hasher.update(&buffer[..n]);
                    self.done += n;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use core::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_add_epi64, _mm256_loadu_si256,
        _mm256_mul_epu32, _mm256_set1_epi32, _mm256_shuffle_epi32, _mm256_slli_epi64,
        _mm256_srli_epi64, _mm256_storeu_si256, _mm256_stream_si256, _mm256_xor_si256,
    };

    use super::SCRAMBLE;

    const STRIPE: usize = 64;
    const PRIME32_1: u64 = 0x9E37_79B1;
    const PRIME32_2: u64 = 0x85EB_CA77;
    const PRIME32_3: u64 = 0xC2B2_AE3D;
    const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
    const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
    const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
    const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
    const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

    /// Accumulators before the first stripe.
    pub(super) const START: [u64; 8] = [
        PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
    ];

    /// Default secret of XXH3.
    static SECRET: [u8; 192] = [
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad,
        0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3,
        0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc,
        0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
        0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65,
        0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
        0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9,
        0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
        0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb,
        0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0,
        0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d,
        0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
        0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
    ];

    /// How the bytes that were read are stored.
    trait Store {
        /// # Safety
        /// `target` is writable (and aligned, where the kind asks for it).
        unsafe fn store(target: *mut u8, value: __m256i);
    }

    /// Not at all: only the hash is wanted.
    struct Nowhere;
    /// Past the cache: the next reader comes long after, and a line that is
    /// written whole need not be read first. Needs 32-byte alignment.
    struct Streamed;
    /// As usual.
    struct Cached;

    impl Store for Nowhere {
        #[inline(always)]
        unsafe fn store(_: *mut u8, _: __m256i) {}
    }

    impl Store for Streamed {
        #[inline(always)]
        unsafe fn store(target: *mut u8, value: __m256i) {
            // SAFETY: writable and aligned by the trait's contract.
            unsafe { _mm256_stream_si256(target.cast(), value) }
        }
    }

    impl Store for Cached {
        #[inline(always)]
        unsafe fn store(target: *mut u8, value: __m256i) {
            // SAFETY: writable by the trait's contract.
            unsafe { _mm256_storeu_si256(target.cast(), value) }
        }
    }

    /// Adds one stripe of 64 bytes to the accumulators.
    ///
    /// # Safety
    /// 64 bytes readable at `source` and `secret`, writable at `target`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn stripe<S: Store>(
        acc: &mut [__m256i; 2],
        source: *const u8,
        target: *mut u8,
        secret: *const u8,
    ) {
        for (half, acc) in acc.iter_mut().enumerate() {
            // SAFETY: 32 of the 64 bytes that the caller promised.
            unsafe {
                let data = _mm256_loadu_si256(source.add(32 * half).cast());
                S::store(target.wrapping_add(32 * half), data);
                let key = _mm256_loadu_si256(secret.add(32 * half).cast());
                let keyed = _mm256_xor_si256(data, key);
                let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                let swapped = _mm256_shuffle_epi32::<0x4E>(data);
                *acc = _mm256_add_epi64(product, _mm256_add_epi64(*acc, swapped));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn scramble(acc: &mut [__m256i; 2]) {
        let prime = _mm256_set1_epi32(PRIME32_1 as i32);
        for (half, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the last 64 bytes of the secret.
            let key = unsafe { _mm256_loadu_si256(SECRET.as_ptr().add(128 + 32 * half).cast()) };
            let mixed = _mm256_xor_si256(*acc, _mm256_srli_epi64::<47>(*acc));
            let keyed = _mm256_xor_si256(mixed, key);
            let low = _mm256_mul_epu32(keyed, prime);
            let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
            *acc = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load(acc: &[u64; 8]) -> [__m256i; 2] {
        // SAFETY: 64 bytes, read unaligned.
        unsafe {
            [
                _mm256_loadu_si256(acc.as_ptr().cast()),
                _mm256_loadu_si256(acc.as_ptr().add(4).cast()),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn save(acc: &mut [u64; 8], from: [__m256i; 2]) {
        // SAFETY: 64 bytes, written unaligned.
        unsafe {
            _mm256_storeu_si256(acc.as_mut_ptr().cast(), from[0]);
            _mm256_storeu_si256(acc.as_mut_ptr().add(4).cast(), from[1]);
        }
    }

    /// Whole pieces of 1,024 bytes, each ended by a scramble.
    ///
    /// # Safety
    /// AVX2; [from, upto) readable and, where `target` is not null, writable.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn pieces(
        acc: &mut [u64; 8],
        source: *const u8,
        target: *mut u8,
        from: usize,
        upto: usize,
    ) {
        // SAFETY: passed on unchanged; Streamed only where it is aligned.
        unsafe {
            if target.is_null() {
                pieces_to::<Nowhere>(acc, source, target, from, upto);
            } else if target.addr().is_multiple_of(32) {
                pieces_to::<Streamed>(acc, source, target, from, upto);
                // Streamed stores are weakly ordered; what follows must not
                // be seen before them.
                _mm_sfence();
            } else {
                pieces_to::<Cached>(acc, source, target, from, upto);
            }
        }
    }

    /// # Safety
    /// As `pieces`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pieces_to<S: Store>(
        acc: &mut [u64; 8],
        source: *const u8,
        target: *mut u8,
        from: usize,
        upto: usize,
    ) {
        let mut lanes = load(acc);
        let mut at = from;
        while at < upto {
            for i in 0..SCRAMBLE / STRIPE {
                let here = at + i * STRIPE;
                // The hardware stops at the end of a 4 KiB page; a prefetch
                // of an address that is not mapped does nothing.
                _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(here + 2048).cast());
                // SAFETY: inside [from, upto); the secret has 192 bytes.
                unsafe {
                    stripe::<S>(
                        &mut lanes,
                        source.add(here),
                        target.wrapping_add(here),
                        SECRET.as_ptr().add(8 * i),
                    );
                }
            }
            scramble(&mut lanes);
            at += SCRAMBLE;
        }
        save(acc, lanes);
    }

    /// What is left after the whole pieces, and the final mixing.
    ///
    /// # Safety
    /// AVX2; `len` bytes readable and, where `target` is not null, writable;
    /// `len` > 1,024, 0 < len - done <= 1,024.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn finish(
        acc: &mut [u64; 8],
        source: *const u8,
        target: *mut u8,
        done: usize,
        len: usize,
    ) -> u64 {
        // The last stripe overlaps bytes that were read before: all of it is
        // taken from one private copy, so that hash and store agree even if
        // the source changes in between.
        let mut tail = [0_u8; SCRAMBLE + STRIPE];
        let rest = len - done;
        // SAFETY: `done` >= 1,024 where `len` is above that, so 64 bytes lie
        // before; the buffer has room for them and for `rest`.
        unsafe {
            if target.is_null() {
                source
                    .add(done - STRIPE)
                    .copy_to_nonoverlapping(tail.as_mut_ptr(), STRIPE + rest);
            } else {
                // The stripe before comes from what was stored.
                target
                    .add(done - STRIPE)
                    .cast_const()
                    .copy_to_nonoverlapping(tail.as_mut_ptr(), STRIPE);
                source
                    .add(done)
                    .copy_to_nonoverlapping(tail.as_mut_ptr().add(STRIPE), rest);
                target
                    .add(done)
                    .copy_from_nonoverlapping(tail.as_ptr().add(STRIPE), rest);
            }
        }
        let tail = &tail[..STRIPE + rest];
        let mut lanes = load(acc);
        for i in 0..(rest - 1) / STRIPE {
            // SAFETY: whole stripes of the tail; at most 15 of the secret.
            unsafe {
                stripe::<Nowhere>(
                    &mut lanes,
                    tail.as_ptr().add(STRIPE + i * STRIPE),
                    std::ptr::null_mut(),
                    SECRET.as_ptr().add(8 * i),
                );
            }
        }
        // SAFETY: the last 64 bytes of the tail; 121 + 64 <= 192.
        unsafe {
            stripe::<Nowhere>(
                &mut lanes,
                tail.as_ptr().add(rest),
                std::ptr::null_mut(),
                SECRET.as_ptr().add(121),
            );
        }
        save(acc, lanes);
        merge(acc, len)
    }

    fn merge(acc: &[u64; 8], len: usize) -> u64 {
        let secret = |at: usize| {
            let mut word = [0_u8; 8];
            word.copy_from_slice(&SECRET[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let mut hash = (len as u64).wrapping_mul(PRIME64_1);
        for i in 0..4 {
            let left = u128::from(acc[2 * i] ^ secret(11 + 16 * i));
            let right = u128::from(acc[2 * i + 1] ^ secret(19 + 16 * i));
            let product = left.wrapping_mul(right);
            hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        hash ^= hash >> 37;
        hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
        hash ^ hash >> 32
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    fn bytes(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..len)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect()
    }

    proptest! {
        #[test]
        fn equals_the_reference(len in 0_usize..9000, seed: u64, shift in 0_usize..33, cut in 0_usize..9000) {
            let source = bytes(len, seed);
            let wanted = xxh3_64(&source);
            // SAFETY: whole vectors.
            unsafe {
                prop_assert_eq!(hash(source.as_ptr(), len), wanted);
                let mut target = vec![0_u8; len + 64];
                prop_assert_eq!(copy(source.as_ptr(), target.as_mut_ptr().add(shift), len), wanted);
                prop_assert_eq!(&target[shift..shift + len], &source[..]);
                prop_assert!(target[..shift].iter().chain(&target[shift + len..]).all(|b| *b == 0));
                let mut pass = Pass::new(len);
                pass.advance(source.as_ptr(), cut);
                pass.advance(source.as_ptr(), cut * 2);
                prop_assert_eq!(pass.end(source.as_ptr()), wanted);
                let mut plain = Pass { len, done: 0, core: Core::Portable(Box::new(Xxh3::new())) };
                prop_assert_eq!(plain.finish(source.as_ptr(), target.as_mut_ptr()), wanted);
                prop_assert_eq!(&target[..len], &source[..]);
            }
        }
    }
}
