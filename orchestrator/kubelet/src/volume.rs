//! The volumes of a pod: folders that containers get as bind mounts.
//!
//! Each lives below the pod's folder, so that removing the pod removes them. What comes from the API is written by
//! [`atomic`] and refreshed while the pod runs; [`token`] gets ServiceAccount tokens.

pub(crate) mod atomic;
pub(crate) mod payload;
pub(crate) mod subpath;
pub(crate) mod token;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use orch_api::Quantity;
use orch_api::k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume,
};

use crate::api;
use crate::pod::env::References;
use crate::pod::fields::Place;
use crate::volume::atomic::{File, Payload};
use crate::volume::token::Tokens;

/// Mode of files from the API unless the volume says otherwise.
const DEFAULT_MODE: u32 = 0o644;

/// Where the volumes of a pod are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Volumes {
    by_name: BTreeMap<String, (PathBuf, bool)>,
}

impl Volumes {
    pub(crate) fn source(&self, name: &str) -> Option<&Path> {
        self.by_name.get(name).map(|(path, _)| path.as_path())
    }

    pub(crate) fn is_read_only(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(|(_, read_only)| *read_only)
    }
}

/// What volumes are filled from.
pub(crate) struct Sources<'a> {
    pub(crate) references: &'a References,
    pub(crate) tokens: &'a Tokens,
    pub(crate) place: &'a Place,
}

/// Folder of a pod, with all that the agent keeps for it.
pub(crate) fn pod_folder(pods: &Path, uid: &str) -> PathBuf {
    pods.join(uid)
}

/// Makes and fills all volumes; safe to repeat, which refreshes what comes from the API.
///
/// # Errors
/// The text names the volume, and is for an event.
pub(crate) fn ensure(folder: &Path, pod: &Pod, sources: &Sources<'_>) -> Result<Volumes, String> {
    let mut all = Volumes::default();
    let spec = api::spec(pod);
    let group = spec.security_context.as_ref().and_then(|context| context.fs_group);
    let group = group.and_then(|group| u32::try_from(group).ok());
    for volume in spec.volumes.iter().flatten() {
        let target = folder.join("volumes").join(&volume.name);
        let made = ensure_one(&target, pod, volume, sources, group).map_err(|error| {
            format!("MountVolume.SetUp failed for volume \"{}\" : {error}", volume.name)
        })?;
        all.by_name.insert(volume.name.clone(), made);
    }
    Ok(all)
}

fn ensure_one(
    target: &Path,
    pod: &Pod,
    volume: &Volume,
    sources: &Sources<'_>,
    group: Option<u32>,
) -> Result<(PathBuf, bool), String> {
    if let Some(source) = &volume.empty_dir {
        empty_dir(target, source, group)?;
        return Ok((target.to_owned(), false));
    }
    if let Some(source) = &volume.host_path {
        return Ok((host_path(source)?, false));
    }
    let payload = payload(pod, volume, sources)?;
    if volume.secret.is_some() || volume.projected.is_some() {
        keep_in_memory(target)?;
    }
    atomic::write(target, &payload, group).map_err(|error| error.to_string())?;
    Ok((target.to_owned(), true))
}

fn empty_dir(
    target: &Path,
    source: &EmptyDirVolumeSource,
    group: Option<u32>,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("make {}: {error}", target.display());
    let fresh = !target.exists();
    fs::create_dir_all(target).map_err(failed)?;
    if source.medium.as_deref() == Some("Memory") && !is_mount_point(target) {
        let limit = source.size_limit.as_ref().and_then(|limit| Quantity::parse(&limit.0).ok());
        mount_tmpfs(target, limit.map(|limit| format!("size={}", limit.value())))?;
    } else if !fresh {
        return Ok(());
    }
    // The set-group bit hands the group on to new files.
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    std::os::unix::fs::chown(target, None, group).map_err(failed)?;
    fs::set_permissions(target, fs::Permissions::from_mode(mode)).map_err(failed)
}

fn mount_tmpfs(target: &Path, options: Option<String>) -> Result<(), String> {
    let kind = Some("tmpfs");
    nix::mount::mount(kind, target, kind, MsFlags::empty(), options.as_deref())
        .map_err(|error| format!("mount tmpfs on {}: {error}", target.display()))
}

/// Secrets and tokens are not written to a disk, as with the kubelet.
fn keep_in_memory(target: &Path) -> Result<(), String> {
    fs::create_dir_all(target).map_err(|error| format!("make {}: {error}", target.display()))?;
    if is_mount_point(target) {
        return Ok(());
    }
    mount_tmpfs(target, Some("mode=0755".to_owned()))
}

fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(parent) != device(path))
}

fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    use std::os::unix::fs::FileTypeExt as _;
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let failed = |error: std::io::Error| format!("make {}: {error}", path.display());
    match kind {
        "DirectoryOrCreate" if !path.exists() => fs::create_dir_all(&path).map_err(failed)?,
        "FileOrCreate" if !path.exists() => fs::write(&path, b"").map_err(failed)?,
        // Docker's own rule for a path that is not there, which the kubelet relies on too.
        "" if !path.exists() => fs::create_dir_all(&path).map_err(failed)?,
        _ => {}
    }
    let meta = fs::metadata(&path).map_err(|_| {
        format!("hostPath type check failed: {} does not exist on the node", path.display())
    })?;
    let fits = match kind {
        "Directory" | "DirectoryOrCreate" => meta.is_dir(),
        "File" | "FileOrCreate" => meta.is_file(),
        "Socket" => meta.file_type().is_socket(),
        "CharDevice" => meta.file_type().is_char_device(),
        "BlockDevice" => meta.file_type().is_block_device(),
        _ => true,
    };
    if fits {
        Ok(path)
    } else {
        Err(format!("hostPath type check failed: {} is not a {kind}", path.display()))
    }
}

fn payload(pod: &Pod, volume: &Volume, sources: &Sources<'_>) -> Result<Payload, String> {
    if let Some(source) = &volume.config_map {
        let mode = payload::mode(source.default_mode, DEFAULT_MODE);
        return config_map(sources, &source.name, source.items.as_deref(), mode, source.optional);
    }
    if let Some(source) = &volume.secret {
        let name = source.secret_name.as_deref().unwrap_or_default();
        let mode = payload::mode(source.default_mode, DEFAULT_MODE);
        return secret(sources, name, source.items.as_deref(), mode, source.optional);
    }
    if let Some(source) = &volume.downward_api {
        let mode = payload::mode(source.default_mode, DEFAULT_MODE);
        return payload::downward(
            pod,
            sources.place,
            source.items.as_deref().unwrap_or_default(),
            mode,
        );
    }
    let Some(projected) = &volume.projected else {
        return Err("this kind of volume is not supported on this node".to_owned());
    };
    let mode = payload::mode(projected.default_mode, DEFAULT_MODE);
    let mut all = Payload::new();
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            all.extend(config_map(
                sources,
                &source.name,
                source.items.as_deref(),
                mode,
                source.optional,
            )?);
        }
        if let Some(source) = &source.secret {
            all.extend(secret(
                sources,
                &source.name,
                source.items.as_deref(),
                mode,
                source.optional,
            )?);
        }
        if let Some(source) = &source.downward_api {
            let items = source.items.as_deref().unwrap_or_default();
            all.extend(payload::downward(pod, sources.place, items, mode)?);
        }
        if let Some(source) = &source.service_account_token {
            let token = sources.tokens.get(source)?;
            // Readable by all users of the pod, as its containers may run as any.
            all.insert(source.path.clone(), File { data: token.into_bytes(), mode });
        }
    }
    Ok(all)
}

fn config_map(
    sources: &Sources<'_>,
    name: &str,
    items: Option<&[orch_api::k8s_openapi::api::core::v1::KeyToPath]>,
    mode: u32,
    optional: Option<bool>,
) -> Result<Payload, String> {
    let optional = optional == Some(true);
    match sources.references.config_maps.get(name) {
        Some(map) => {
            payload::project(&payload::config_map_entries(map), items, mode, optional, name)
        }
        None if optional => Ok(Payload::new()),
        None => Err(format!("configmap \"{name}\" not found")),
    }
}

fn secret(
    sources: &Sources<'_>,
    name: &str,
    items: Option<&[orch_api::k8s_openapi::api::core::v1::KeyToPath]>,
    mode: u32,
    optional: Option<bool>,
) -> Result<Payload, String> {
    let optional = optional == Some(true);
    match sources.references.secrets.get(name) {
        Some(secret) => {
            payload::project(&payload::secret_entries(secret), items, mode, optional, name)
        }
        None if optional => Ok(Payload::new()),
        None => Err(format!("secret \"{name}\" not found")),
    }
}

/// Whether the pod has volumes whose content may change while it runs.
pub(crate) fn has_live_content(pod: &Pod) -> bool {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).any(|volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.projected.is_some()
            || volume.downward_api.is_some()
    })
}

/// Removes the pod's folder, unmounting what is mounted in it. Goes on past failures and returns them together.
///
/// # Errors
/// Something is left.
pub(crate) fn remove(folder: &Path) -> Result<(), String> {
    let mut errors = Vec::new();
    if let Ok(entries) = fs::read_dir(folder.join("volumes")) {
        for entry in entries.flatten().filter(|entry| is_mount_point(&entry.path())) {
            if let Err(error) = nix::mount::umount2(&entry.path(), MntFlags::MNT_DETACH) {
                errors.push(format!("unmount {}: {error}", entry.path().display()));
            }
        }
    }
    if errors.is_empty() {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                errors.push(format!("remove {}: {error}", folder.display()));
            }
            _ => {}
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}
