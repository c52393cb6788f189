//! What a GPU says of itself, and what it needs for copies of boxes.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::launch::{Boxes, Gpu, Properties, TensorMap};
use super::loaded::{driver_error, require_driver};
use crate::Result;
use crate::device::gpu::selection::PciAddress;
use crate::device::kernels::ARCHES;

static KNOWN: Mutex<BTreeMap<i32, Arc<Properties>>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// # Errors
    /// `Unavailable` without driver; `Runtime` with CUDA's reason.
    pub(super) fn known_properties(self) -> Result<Arc<Properties>> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let ordinal = self.ordinal()?;
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(properties) = known.get(&ordinal) {
            return Ok(properties.clone());
        }
        require_driver()?;
        let ask = || {
            result::init()?;
            let device = result::device::get(ordinal)?;
            // SAFETY: the device was just returned by CUDA.
            let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
            let is_sm_90 = (attribute(MAJOR)?, attribute(MINOR)?) == (9, 0);
            Ok(Properties {
                name: result::device::get_name(device)?,
                multiprocessors: attribute(MULTIPROCESSORS)?.max(1) as u32,
                is_hopper: is_sm_90 && ARCHES.contains(&"sm_90a"),
            })
        };
        let properties = ask().map_err(|e| driver_error(&format!("asking cuda:{ordinal}"), e))?;
        Ok(known.entry(ordinal).or_insert(Arc::new(properties)).clone())
    }

    /// Where the card sits: what NVML and CUDA both know it by, whatever CUDA_VISIBLE_DEVICES says.
    ///
    /// # Errors
    /// As [`Gpu::known_properties`].
    pub fn pci_address(self) -> Result<PciAddress> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_PCI_BUS_ID as BUS, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID as DEVICE,
            CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID as DOMAIN,
        };
        let ordinal = self.ordinal()?;
        require_driver()?;
        let ask = || {
            result::init()?;
            let device = result::device::get(ordinal)?;
            // SAFETY: the device was just returned by CUDA.
            let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map(|n| n as u32);
            Ok(PciAddress { domain: attribute(DOMAIN)?, bus: attribute(BUS)?, device: attribute(DEVICE)? })
        };
        ask().map_err(|e| driver_error(&format!("asking cuda:{ordinal}"), e))
    }

    /// With the 128-byte swizzle that kernels/include/hopper.cuh expects, zeros outside.
    pub(super) fn encode(self, boxes: &Boxes) -> Result<TensorMap> {
        const BYTES: u64 = 2; // of an element
        let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
        let (sizes, strides) = ([boxes.columns, boxes.rows], [boxes.columns * BYTES]);
        let (of_box, steps) = ([64, boxes.box_rows], [1, 1]);
        // CUDA wants a context for it.
        self.in_primary_context("describing a matrix for copies of boxes", || {
            // SAFETY: the arrays are as long as two dimensions need; the address is only written into the map.
            let outcome = unsafe {
                sys::cuTensorMapEncodeTiled(
                    &raw mut map,
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    2,
                    boxes.from,
                    sizes.as_ptr(),
                    strides.as_ptr(),
                    of_box.as_ptr(),
                    steps.as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            outcome.result()
        })?;
        Ok(map.opaque)
    }
}
