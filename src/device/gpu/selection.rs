//! Which of NVML's GPUs is CUDA's device N.
//!
//! NVML numbers all cards; CUDA numbers those of CUDA_VISIBLE_DEVICES, in the order of CUDA_DEVICE_ORDER. A card's PCI
//! address, as CUDA tells it, leaves no doubt, so a run uses that. Where CUDA is not asked the two variables are read
//! as CUDA does: a list of numbers and of (beginnings of) UUIDs that ends before the first wrong entry. The default
//! order, FASTEST_FIRST, is known for cards of one kind only, where it is that of the PCI addresses; on others numbers
//! lead nowhere without `CUDA_DEVICE_ORDER=PCI_BUS_ID`: no answer is better than another card's numbers.

use std::fmt;

use nvml_wrapper::Nvml;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    pub domain: u32,
    pub bus: u32,
    pub device: u32,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "{:08X}:{:02X}:{:02X}.0", self.domain, self.bus, self.device)
    }
}

/// A card to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Card {
    /// NVML's own number.
    Index(u32),
    Pci(PciAddress),
    /// CUDA's device, through the environment.
    Cuda(usize),
}

/// What tells the cards of a machine apart.
#[derive(Clone, Debug)]
pub struct Identity {
    pub index: u32,
    pub name: String,
    pub uuid: String,
    pub pci: PciAddress,
}

pub(super) fn identities(nvml: &Nvml) -> Vec<Identity> {
    let one = |index| {
        let device = nvml.device_by_index(index).ok()?;
        let pci = device.pci_info().ok()?;
        Some(Identity {
            index,
            name: device.name().unwrap_or_default(),
            uuid: device.uuid().unwrap_or_default(),
            pci: PciAddress { domain: pci.domain, bus: pci.bus, device: pci.device },
        })
    };
    (0..nvml.device_count().unwrap_or(0)).filter_map(one).collect()
}

impl Card {
    /// NVML's number of the card.
    pub(super) fn index(self, nvml: &Nvml) -> Result<u32, String> {
        match self {
            Card::Index(index) => Ok(index),
            Card::Pci(pci) => identities(nvml)
                .iter()
                .find(|card| card.pci == pci)
                .map(|card| card.index)
                .ok_or_else(|| format!("NVML has no GPU at {pci}")),
            Card::Cuda(index) => {
                let [visible, order] =
                    ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"].map(|name| std::env::var(name).ok());
                of_cuda(index, visible.as_deref(), order.as_deref(), &identities(nvml))
                    .ok_or_else(|| format!("which of NVML's GPUs is cuda:{index} is not known"))
            }
        }
    }
}

/// NVML's number of CUDA's device `index` under these values of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.
pub fn of_cuda(index: usize, visible: Option<&str>, order: Option<&str>, cards: &[Identity]) -> Option<u32> {
    let mut ordered: Vec<&Identity> = cards.iter().collect();
    ordered.sort_by_key(|card| card.pci);
    let order_is_known = order == Some("PCI_BUS_ID") || cards.windows(2).all(|pair| pair[0].name == pair[1].name);
    let numbered = |number: usize| ordered.get(number).copied();
    let Some(visible) = visible else {
        return numbered(index).filter(|_| order_is_known).map(|card| card.index);
    };
    let mut chosen: Vec<(u32, bool)> = Vec::new();
    for entry in visible.split(',').map(str::trim) {
        let by_number = entry.parse::<usize>().ok();
        let card = match by_number {
            Some(number) => numbered(number),
            None if entry.starts_with("GPU-") => only(ordered.iter().copied().filter(|c| c.uuid.starts_with(entry))),
            None => None,
        };
        let Some(card) = card.filter(|card| chosen.iter().all(|(taken, _)| *taken != card.index)) else { break };
        chosen.push((card.index, by_number.is_none() || order_is_known));
    }
    chosen.get(index).filter(|(_, known)| *known).map(|(index, _)| *index)
}

fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    items.next().filter(|_| items.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVML's numbers are not in the order of the addresses here, as NVML leaves open.
    fn cards(names: [&str; 4]) -> Vec<Identity> {
        let one = |(i, name): (usize, &str)| Identity {
            index: i as u32,
            name: name.to_string(),
            uuid: format!("GPU-{i}{i}ab-{i}"),
            pci: PciAddress { domain: 0, bus: [0x10, 0x3b, 0x20, 0xaf][i], device: 0 },
        };
        names.into_iter().enumerate().map(one).collect()
    }

    #[test]
    fn visible_devices_are_read_as_cuda_reads_them() {
        let same = cards(["A100"; 4]);
        let found = |index, visible| of_cuda(index, visible, None, &same);
        // Without the variable: by address, 0x10 0x20 0x3b 0xaf.
        assert_eq!([0, 1, 2, 3, 4].map(|i| found(i, None)), [Some(0), Some(2), Some(1), Some(3), None]);
        assert_eq!([0, 1, 2].map(|i| found(i, Some("3, 1"))), [Some(3), Some(2), None]);
        assert_eq!([0, 1].map(|i| found(i, Some("GPU-22ab-2,GPU-0"))), [Some(2), Some(0)]);
        assert_eq!(found(0, Some("GPU-")), None, "not a single card");
        assert_eq!([0, 1].map(|i| found(i, Some("1,9,0"))), [Some(2), None], "ends before a wrong entry");
        assert_eq!([0, 1].map(|i| found(i, Some("1,1"))), [Some(2), None]);
        for none in ["", "-1", "NoDevFiles", "MIG-1/2/3"] {
            assert_eq!(found(0, Some(none)), None, "{none}");
        }
    }

    #[test]
    fn mixed_cards_need_an_order_or_a_uuid() {
        let mixed = cards(["A100", "T4", "A100", "T4"]);
        assert_eq!(of_cuda(0, None, None, &mixed), None);
        assert_eq!(of_cuda(0, Some("2"), Some("FASTEST_FIRST"), &mixed), None);
        assert_eq!(of_cuda(0, Some("2"), Some("PCI_BUS_ID"), &mixed), Some(1));
        assert_eq!(of_cuda(1, Some("0,GPU-3"), None, &mixed), Some(3));
        assert_eq!(PciAddress { domain: 0, bus: 0xaf, device: 0 }.to_string(), "00000000:AF:00.0");
    }
}
