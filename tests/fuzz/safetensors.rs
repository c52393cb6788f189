//! A damaged .safetensors file, and a damaged header before sound data.

use std::fs;

use proptest::prelude::*;
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors};

use super::assert_one_input_line;
use super::damage::{apply, damage};

const WORDS: &[&str] = &[
    "\"dtype\":\"F4\"",
    "\"dtype\":\"F8_E8M0\"",
    "\"data_offsets\":[0,18446744073709551615]",
    "\"data_offsets\":[8,0]",
    "\"shape\":[4294967296,4294967296,4294967296]",
    "\"shape\":[0]",
    "\"shape\":[-1]",
    "\"__metadata__\":{\"a\":1},",
    "18446744073709551616",
    "1e400",
    "null",
    "[",
    "{",
    "\"",
    "\\u0000",
    "\n",
];

fn good_file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("good.safetensors");
    let tensor = |name: &str, dtype, shape: &[usize], bytes: usize| TensorBytes {
        spec: TensorSpec::new(name, dtype, shape),
        data: vec![0x3C; bytes].into(),
    };
    let tensors = [
        tensor("a.weight", StoredDtype::F32, &[3, 5], 60),
        tensor("b.weight", StoredDtype::BF16, &[2, 7], 28),
        tensor("c.bias", StoredDtype::F16, &[0], 0),
        tensor("d", StoredDtype::I64, &[], 8),
    ];
    write_safetensors(&path, &tensors).unwrap();
    fs::read(&path).unwrap()
}

/// Opens `bytes` as a file. Everything that an opened file lists can be read, and lies within the file.
fn open(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.safetensors");
    fs::write(&path, bytes).unwrap();
    let checkpoint = match Checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return assert_one_input_line(&error, bytes),
    };
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).unwrap();
        let bits = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize();
        assert_eq!(tensor.data.len() * 8, bits, "tensor {name}");
        match checkpoint.tensor_f32(name) {
            Ok(values) => assert_eq!(values.len(), tensor.shape.iter().product::<usize>()),
            Err(error) => assert_one_input_line(&error, bytes),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_damage(changes in damage(WORDS)) {
        open(&apply(good_file(), &changes));
    }

    /// The length before the header is right again, so that the damage reaches the header's reader.
    #[test]
    fn damaged_header(changes in damage(WORDS)) {
        let good = good_file();
        let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        let header = apply(good[8..8 + length].to_vec(), &changes);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(&good[8 + length..]);
        open(&bytes);
    }
}

#[test]
fn the_undamaged_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("good.safetensors");
    fs::write(&path, good_file()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().names().count(), 4);
}
