//! Rows of endpoints: the map that says what holds, and the places in front of it that programs look at first.

use aya::maps::hash_map::HashMap;
use aya::maps::{Array, MapData};
use orch_ebpf_maps::{Endpoint, EndpointRow, MAX_ENDPOINTS};

use crate::maps::{found, gone, open};
use crate::{Error, Pins};

const ROWS: &str = "endpoints";
const PLACES: &str = "endpoint_cache";

/// Both maps. What is in a place is what the row is, or nothing; so a place is emptied before its row is written, and filled
/// after that. Plugin and agent write without a lock, which one of them might be stopped with.
pub(crate) struct Rows {
    rows: HashMap<MapData, u32, EndpointRow>,
    places: Array<MapData, EndpointRow>,
}

fn place(ifindex: u32) -> u32 {
    ifindex % MAX_ENDPOINTS
}

impl Rows {
    pub(crate) fn open(pins: &Pins) -> Result<Self, Error> {
        Ok(Self { rows: open(pins, ROWS)?, places: open(pins, PLACES)? })
    }

    pub(crate) fn get(&self, ifindex: u32) -> Result<Option<EndpointRow>, Error> {
        found(self.rows.get(&ifindex, 0)).map_err(Error::map("read", ROWS))
    }

    pub(crate) fn all(&self) -> Result<Vec<(u32, Endpoint)>, Error> {
        let rows = self.rows.iter().map(|row| row.map(|(link, row)| (link, row.endpoint)));
        rows.collect::<Result<_, _>>().map_err(Error::map("read", ROWS))
    }

    /// Writes a row, with the flags of the kernel's call.
    pub(crate) fn put(&mut self, row: EndpointRow, flags: u64) -> Result<(), Error> {
        self.empty(row.link)?;
        self.rows.insert(row.link, row, flags).map_err(Error::map("write", ROWS))?;
        self.fill(row)
    }

    /// Removes a row; one that is not there is removed.
    pub(crate) fn remove(&mut self, ifindex: u32) -> Result<(), Error> {
        self.empty(ifindex)?;
        gone(self.rows.remove(&ifindex)).map_err(Error::map("empty", ROWS))?;
        // Somebody who wrote the row at the same time may have filled the place before it was removed.
        self.empty(ifindex)
    }

    /// Brings places back in order that somebody left who was killed while writing: nothing in them is wrong then, but
    /// something may be missing.
    pub(crate) fn mend(&mut self) -> Result<(), Error> {
        for (ifindex, _) in self.all()? {
            let in_place =
                self.places.get(&place(ifindex), 0).map_err(Error::map("read", PLACES))?;
            let row = self.get(ifindex)?;
            // Links that share a place have it by turns.
            if let Some(row) = row.filter(|row| *row != in_place) {
                self.empty(ifindex)?;
                self.fill(row)?;
            }
        }
        Ok(())
    }

    fn empty(&mut self, ifindex: u32) -> Result<(), Error> {
        let nobody = EndpointRow::new(0, Endpoint::default());
        self.places.set(place(ifindex), nobody, 0).map_err(Error::map("empty", PLACES))
    }

    /// Fills the place of a row that was written, unless it has become another one meanwhile.
    fn fill(&mut self, row: EndpointRow) -> Result<(), Error> {
        self.places.set(place(row.link), row, 0).map_err(Error::map("fill", PLACES))?;
        if self.get(row.link)? == Some(row) { Ok(()) } else { self.empty(row.link) }
    }
}
