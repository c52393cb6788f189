//! Every barrier of the kernels is needed, and every wait for asynchronous copies, and the shim sees it missing: with one
//! deleted from a copy of the sources, built in the same way, some thread order gives other results.

use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use temper::numerics::block_format::TensorScale;
use temper::numerics::error_law::ErrorLaw;
use temper::numerics::format::Format;
use temper::ops::cuda::decode_attention::{Heads, decode_attention};
use temper::ops::cuda::fake_quant::{Matrix, MatrixScale, Wanted, quantize};
use temper::ops::cuda::launch::{Boxes, Executor, Launch, Properties, TensorMap};
use temper::ops::cuda::matmul::{self, Layout, PackedWeight, Product, choices};
use temper::ops::cuda::noise::{Destination, Law, Noisy, add_noise, new_sums, read_sums};
use temper::ops::cuda::rms_norm::{self, NormBackward};
use temper::ops::cuda::sampling;
use temper::ops::matmul_error::{ErrorDraw, RowKeys};
use temper::ops::sampling::SamplingRule;
use temper::{Error, Result};

use crate::host::{ORDERS, Shim};
use crate::support::{nasty, tensor};

/// How the statements begin that are deleted; not where the comment says why `no test can see it`.
const BARRIERS: [&str; 5] = ["__syncthreads();", "wait_copies<", "wait_products<", "wait_barrier(", "cluster_sync();"];

#[test]
fn a_deleted_barrier_is_noticed() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let barriers = barriers(&kernels);
    assert!(barriers.len() >= 4, "{barriers:?}");
    let makes: [fn(&dyn Executor) -> Result<Made>; 2] = [results, hopper_results];
    let expected = makes.map(|make| make(&Shim(0)).unwrap());
    for (make, expected) in makes.iter().zip(&expected) {
        assert!(ORDERS.iter().all(|shim| make(shim).unwrap() == *expected), "the thread order shows in the kernels");
    }
    let workers: Vec<_> = barriers
        .into_iter()
        .map(|(file, at, length)| {
            let kind = usize::from(file.ends_with("matmul_sm90.cuh"));
            let (kernels, make, expected) = (kernels.clone(), makes[kind], expected[kind].clone());
            std::thread::spawn(move || {
                let directory = tempfile::tempdir().unwrap();
                let library = Library::build(&kernels, directory.path(), &file, at..at + length);
                let same = |order: u32| make(&Order { library: &library, order }).is_ok_and(|found| found == expected);
                assert!(!ORDERS.iter().all(|shim| same(shim.0)), "{}: byte {at}: not missed", file.display());
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

/// (file, byte, length) of every barrier of the kernels.
fn barriers(kernels: &Path) -> Vec<(PathBuf, usize, usize)> {
    let directories = [kernels.to_path_buf(), kernels.join("include")];
    let files = directories.iter().flat_map(|directory| std::fs::read_dir(directory).unwrap().flatten());
    let sources =
        files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    let in_file = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(kernels).unwrap().to_path_buf();
        let mut found = Vec::new();
        for line in text.lines() {
            let statement = line.trim_start();
            if BARRIERS.iter().any(|begin| statement.starts_with(begin)) && !line.contains("no test can see it") {
                let at = statement.as_ptr() as usize - text.as_ptr() as usize;
                found.push((name.clone(), at, statement.find(';').unwrap() + 1));
            }
        }
        found
    };
    sources.flat_map(in_file).collect()
}

/// Tensors, as bytes.
type Made = Vec<Vec<u8>>;

fn bytes(t: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0u8; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut bytes, t.numel());
    bytes
}

/// Sums in f32: their order depends on that of blocks and threads.
fn of_any_order(sums: &Tensor) -> Result<Vec<u8>> {
    Ok(format!("{:?}", read_sums(sums)?[0].map(|s| s as f32)).into_bytes())
}

/// What kernels with shared memory make: amaxes, square tiles, sums of a block.
fn results(executor: &dyn Executor) -> Result<Made> {
    let x = tensor(&nasty(40, 272, 2, false), 40, 272, Kind::BFloat16);
    let mut found = Vec::new();
    for format in ["mxfp4:2d", "nvfp4:2d", "nvfp4", "fp8:tensor"] {
        let matrix = Matrix { x: &x, scale: MatrixScale::Own(TensorScale::Tensor), draw: None };
        let wanted = Wanted { dequantized: true, codes: false, error_sums: true };
        let batch = quantize(executor, format.parse().unwrap(), &[matrix], wanted)?;
        let made = &batch.matrices[0];
        found.extend(made.dequantized.iter().chain(&made.amax).map(bytes));
        found.extend(batch.error_sums()?.iter().map(|s| {
            let sums = [s.x_sq, s.q_sq, s.x_q, s.error_sq, s.max_abs_error, s.relative].map(|sum| sum as f32);
            format!("{sums:?} {:?}", [s.elements, s.nonzero, s.deadzone, s.saturated, s.nonfinite]).into_bytes()
        }));
    }
    let (out, sums) = (x.empty_like(), new_sums(1, Device::Cpu)?);
    let law = Law { law: ErrorLaw::RelativeGaussian, seed: 3, sums: Some(&sums) };
    let keys = RowKeys::consecutive(0, 40);
    let noisy = Noisy { y: &x, into: Destination::Store(&out), bias: None, keys: &keys, scale: 0.05, stream: 1 };
    add_noise(executor, &law, &[noisy])?;
    found.extend([bytes(&out), of_any_order(&sums)?]);
    // Several rows a block, several parts.
    let norm = NormBackward {
        s: &x.clamp(-8.0, 8.0),
        dy: &x.clamp(-1.0, 1.0),
        ds: None,
        weight: &Tensor::ones([272], (Kind::Float, Device::Cpu)),
        eps: 1e-6,
        wants_dweight: true,
    };
    let gradients = rms_norm::backward(executor, &norm)?;
    found.push(bytes(&gradients.dx));
    found.extend(gradients.dweight.iter().map(bytes));
    let rule = SamplingRule { greedy: false, temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3, stream: 9 };
    let logits = tensor(&nasty(3, 5000, 7, false), 3, 5000, Kind::Float).clamp(-8.0, 8.0);
    let (ids, logprobs) = sampling::sample(executor, &logits, &Tensor::from_slice(&[1i64, 2, 3]), &rule)?;
    found.extend([bytes(&ids), bytes(&logprobs)]);
    let cache = tensor(&nasty(60, 64, 8, false), 60, 64, Kind::Float).clamp(-8.0, 8.0).view([1, 1, 60, 64]);
    let (q, lengths) = (cache.narrow(2, 0, 4).contiguous().view([1, 4, 64]), Tensor::from_slice(&[55i64]));
    let heads = Heads { q: &q, keys: &cache, values: &cache, lengths: &lengths, longest: 60, scale: 0.1 };
    found.push(bytes(&decode_attention(executor, &heads)?));
    // Two splits of several stages each.
    for (kind, splits) in [(Kind::BFloat16, 1), (Kind::BFloat16, 2), (Kind::Float, 1)] {
        let a: Vec<f32> = nasty(130, 544, 3, false).iter().map(|v| v.clamp(-8.0, 8.0)).collect();
        let a = tensor(&a, 130, 544, kind);
        let out = tensor(&vec![0.0; 130 * 130], 130, 130, Kind::Float);
        let into = Destination::Store(&out);
        let product = Product {
            layout: Layout::Nt,
            a: &a,
            b: &a,
            scales: None,
            into,
            bias: None,
            error: None,
            keys: &keys,
            sums: None,
        };
        let choice = choices(Layout::Nt, kind, 544).into_iter().find(|choice| choice.splits == splits).unwrap();
        matmul::prepare_as(executor, &product, choice)?.run(executor)?;
        found.push(bytes(&out));
    }
    let (a, w) = (
        tensor(&vec![1.5; 40 * 1024], 40, 1024, Kind::BFloat16),
        tensor(&nasty(130, 1024, 5, false), 130, 1024, Kind::BFloat16),
    );
    let w = PackedWeight::quantize(executor, &w.clamp(-8.0, 8.0), Format::NVFP4)?;
    let out = tensor(&vec![0.0; 40 * 130], 40, 130, Kind::Float);
    let into = Destination::Store(&out);
    let (layout, scales) = (w.layout, Some(w.scales()));
    let product =
        Product { layout, a: &a, b: &w.codes, scales, into, bias: None, error: None, keys: &keys, sums: None };
    matmul::prepare_as(executor, &product, choices(layout, Kind::BFloat16, 1024)[0])?.run(executor)?;
    found.push(bytes(&out));
    Ok(found)
}

/// Four tiles of one cluster, more stages than there is room for.
fn hopper_results(executor: &dyn Executor) -> Result<Made> {
    let (m, n, k) = (300, 200, 400);
    let matrix = |rows: usize| {
        let values: Vec<f32> = nasty(rows, k, 3, false).iter().map(|v| v.clamp(-8.0, 8.0)).collect();
        tensor(&values, rows, k, Kind::BFloat16)
    };
    let (a, b) = (matrix(m), matrix(n));
    // In bf16 neighbours exchange what they write, and so the two groups meet in the epilogue.
    let (out, sums) = (tensor(&vec![0.0; m * n], m, n, Kind::BFloat16), new_sums(1, Device::Cpu)?);
    let draw = ErrorDraw { law: ErrorLaw::RelativeGaussian, scale: 0.05, seed: 3, stream: 9 };
    let product = Product {
        layout: Layout::Nt,
        a: &a,
        b: &b,
        scales: None,
        into: Destination::Store(&out),
        bias: None,
        error: Some(&draw),
        keys: &RowKeys::consecutive(0, m),
        sums: Some(&sums),
    };
    let all = product.choices(&*executor.properties()?)?;
    let choice = all.into_iter().find(|choice| choice.tile.is_hopper && choice.tile.n == 128).unwrap();
    matmul::prepare_as(executor, &product, choice)?.run(executor)?;
    Ok(vec![bytes(&out), of_any_order(&sums)?])
}

type Run = unsafe extern "C" fn(*const c_char, u32, u32, u32, *const c_void, usize) -> *const c_char;
type SetOrder = unsafe extern "C" fn(u32);

/// A host build of changed kernels.
struct Library {
    run: Run,
    set_order: SetOrder,
}

impl Library {
    /// Of the kernels without some bytes of `file`.
    fn build(kernels: &Path, directory: &Path, file: &Path, deleted: std::ops::Range<usize>) -> Library {
        let copy = directory.join("kernels");
        let status = Command::new("cp").arg("-r").arg(kernels).arg(&copy).status().unwrap();
        assert!(status.success());
        let mut text = std::fs::read_to_string(copy.join(file)).unwrap();
        text.replace_range(deleted, "");
        std::fs::write(copy.join(file), text).unwrap();
        let library = directory.join("mutant.so");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        // build.rs's flags that decide bits (kernels/compile.rs), without its optimisation.
        let built = Command::new(compiler)
            .args(["-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-fPIC", "-shared", "-o"])
            .arg(&library)
            .args([copy.join("host"), copy.join("include"), copy.clone()].map(|d| format!("-I{}", d.display())))
            .args(["entries.cpp", "hopper.cpp", "shim.cpp"].map(|name| copy.join("host").join(name)))
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let path = CString::new(library.to_str().unwrap()).unwrap();
        let symbol = |name: &str| {
            let name = CString::new(name).unwrap();
            // SAFETY: opens the library that was just built, whose constructors enter its kernels in its own list.
            let symbol =
                unsafe { libc::dlsym(libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL), name.as_ptr()) };
            assert!(!symbol.is_null(), "{name:?}");
            symbol
        };
        // SAFETY: kernels/host/entries.cpp declares them so; the library is never closed.
        unsafe {
            Library {
                run: std::mem::transmute::<*mut c_void, Run>(symbol("temper_host_run")),
                set_order: std::mem::transmute::<*mut c_void, SetOrder>(symbol("temper_host_thread_order")),
            }
        }
    }
}

/// The library as an executor with a thread order.
struct Order<'a> {
    library: &'a Library,
    order: u32,
}

impl Executor for Order<'_> {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn properties(&self) -> Result<Arc<Properties>> {
        Shim(0).properties()
    }

    unsafe fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap> {
        // SAFETY: the caller's promise.
        unsafe { Shim(0).tensor_map(boxes) }
    }

    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        let (name, (args, bytes)) = (CString::new(launch.kernel.as_str()).unwrap(), launch.args());
        // SAFETY: as in `Shim`.
        let error = unsafe {
            (self.library.set_order)(self.order);
            (self.library.run)(name.as_ptr(), launch.blocks, launch.threads, launch.shared_bytes, args, bytes)
        };
        if error.is_null() { Ok(()) } else { Err(Error::Runtime("the shim reports a barrier".into())) }
    }
}
