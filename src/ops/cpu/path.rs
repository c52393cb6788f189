//! Which instruction set the CPU operations use: chosen at run time, never visible in a result.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// An implementation, slowest first; all give the same bits, and tests compare them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    Portable,
    /// AVX2 with FMA and POPCNT.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

/// The fastest path that operations may take.
static LIMIT: AtomicU8 = AtomicU8::new(Path::Avx512 as u8);

impl Path {
    pub const ALL: [Path; 3] = [Path::Portable, Path::Avx2, Path::Avx512];

    /// As `--simd` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Path::Portable => "portable",
            Path::Avx2 => "avx2",
            Path::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has what the path needs.
    pub fn is_available(self) -> bool {
        self == self.or_below()
    }

    /// The fastest path that this CPU has and [`limit`](Path::limit) allows.
    pub fn best() -> Path {
        let limit = LIMIT.load(Ordering::Relaxed);
        Path::ALL.into_iter().rfind(|path| *path as u8 <= limit).unwrap_or(Path::Portable).or_below()
    }

    /// This path, or the fastest below it that the CPU has: the one place that says what may run.
    #[inline]
    pub fn or_below(self) -> Path {
        static FASTEST: LazyLock<Path> = LazyLock::new(fastest);
        self.min(*FASTEST)
    }

    /// Keeps the whole process at or below this path; for benchmarks, since no result depends on it.
    pub fn limit(self) {
        LIMIT.store(self as u8, Ordering::Relaxed);
    }
}

/// Of this CPU.
fn fastest() -> Path {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("popcnt") {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        return if avx512 { Path::Avx512 } else { Path::Avx2 };
    }
    Path::Portable
}

/// Defines `fn name(path, ...)` whose body is compiled once for each path, so that one source vectorises with what the
/// CPU has. Integer arithmetic in it must wrap explicitly: overflow checks do not vectorise.
macro_rules! for_each_path {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$($T:ident: $bound:ident),+>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(unsafe_code)]
        $vis fn $name<$($T: $bound),+>(path: $crate::ops::cpu::path::Path, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable<$($T: $bound),+>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,popcnt")]
            fn avx2<$($T: $bound),+>($($arg: $ty),*) $(-> $ret)? {
                portable::<$($T),+>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")]
            fn avx512<$($T: $bound),+>($($arg: $ty),*) $(-> $ret)? {
                portable::<$($T),+>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match path.or_below() {
                $crate::ops::cpu::path::Path::Portable => {}
                // SAFETY: or_below gives a path only where the CPU has its instructions.
                $crate::ops::cpu::path::Path::Avx2 => return unsafe { avx2::<$($T),+>($($arg),*) },
                // SAFETY: as above.
                $crate::ops::cpu::path::Path::Avx512 => return unsafe { avx512::<$($T),+>($($arg),*) },
            }
            let _ = path;
            portable::<$($T),+>($($arg),*)
        }
    };
}
pub(super) use for_each_path;
