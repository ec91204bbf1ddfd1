//! Any bytes in the place of the kernel's answers are read or refused. The kernel sends no such bytes; a reader that relies
//! on that would be one new attribute away from a panic.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::{address, link, neighbour, qdisc, route, socket};

/// A header of a message and attributes behind it, some of which have attributes inside, and some a wrong length.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let value = vec(any::<u8>(), 0..40);
    let attribute = |value: BoxedStrategy<Vec<u8>>| {
        (0_u16..70, value, prop::option::weighted(0.1, any::<u16>())).prop_map(
            |(kind, value, wrong)| {
                let length = wrong.unwrap_or(4 + u16::try_from(value.len()).unwrap_or(u16::MAX));
                let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
                bytes.extend(value);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                bytes
            },
        )
    };
    let flat = attribute(value.boxed());
    let nested = vec(flat.clone(), 0..6).prop_map(|parts| parts.concat());
    let deep = vec(attribute(nested.boxed()), 0..4).prop_map(|parts| parts.concat());
    let attributes = vec(prop_oneof![flat, attribute(deep.boxed())], 0..12);
    // That of a route has to say of which family and kind it is.
    let route = (prop_oneof![Just(2_u8), Just(10)], vec(any::<u8>(), 6), vec(any::<u8>(), 4))
        .prop_map(|(family, middle, flags)| [vec![family], middle, vec![1], flags].concat());
    let header = prop_oneof![vec(any::<u8>(), 0..20), route];
    (header, attributes).prop_map(|(mut header, attributes)| {
        header.extend(attributes.concat());
        header
    })
}

/// What is said about an object is within what the kernel can say.
fn read(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Some(link) = link::parse_link(bytes) {
        prop_assert!(link.master != Some(0) && (link.port.is_none() || link.master.is_some()));
    }
    let _ =
        (link::parse_vlans(bytes), neighbour::parse_fdb(bytes), neighbour::parse_neighbour(bytes));
    let _ = (address::parse_address(bytes), qdisc::parse_token_bucket(bytes));
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        if let Some(route) = route::parse_route(bytes, family) {
            prop_assert_eq!(route.dst.is_ipv4(), family == libc::AF_INET as u8);
        }
    }
    let mut rest = bytes;
    while let Ok(Some(message)) = socket::next_message(&mut rest) {
        let _ = socket::acknowledgement(&message);
    }
    Ok(())
}

proptest! {
    #[test]
    fn fuzz_messages_of_any_attributes_are_read_or_refused(bytes in messages()) {
        read(&bytes)?;
    }

    #[test]
    fn fuzz_messages_of_any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        read(&bytes)?;
    }
}
