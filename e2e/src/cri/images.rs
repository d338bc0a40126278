//! Images: directories that somebody put there beforehand, described by small files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status};

use super::api::image_service_server::ImageService;
use super::{api, filesystems};

/// One image, as its file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Which images it stands for: their last path components, without tag and digest.
    pub references: Vec<String>,
    /// Its files; `null` for one that only guests use, who have a busybox of their own.
    #[serde(default)]
    pub rootfs: Option<PathBuf>,
    /// What runs when the pod names no command.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Whether its programs need the libraries of this machine.
    #[serde(default)]
    pub libraries: bool,
    /// The user it runs as when the pod names none.
    #[serde(default)]
    pub user: u32,
    /// Its id: `zpod-e2e/` and the name of its file.
    #[serde(skip)]
    pub id: String,
}

/// A directory of image files, read anew at each look.
#[derive(Debug, Clone)]
pub(super) struct Images {
    dir: PathBuf,
}

impl Images {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn all(&self) -> Result<Vec<Image>> {
        let list = fs::read_dir(&self.dir).with_context(|| format!("list {}", self.dir.display()))?;
        let mut images = Vec::new();
        for entry in list {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                images.push(read(&path)?);
            }
        }
        Ok(images)
    }

    /// The image of a reference, or of an id that was given for one.
    pub(super) fn find(&self, reference: &str) -> Result<Option<Image>> {
        let name = short_name(reference);
        let wanted = |image: &Image| image.id == reference || image.references.iter().any(|other| other == name);
        Ok(self.all()?.into_iter().find(wanted))
    }

    /// The same, or what a person is to do about it.
    pub(super) fn get(&self, reference: &str) -> Result<Image> {
        let image = self.find(reference)?;
        image.with_context(|| {
            let name = short_name(reference);
            format!("no image {reference}: no file in {} has {name:?} among its references", self.dir.display())
        })
    }
}

fn read(path: &Path) -> Result<Image> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut image: Image = serde_json::from_slice(&text).with_context(|| format!("image {}", path.display()))?;
    image.id = format!("zpod-e2e/{}", path.file_stem().unwrap_or_default().to_string_lossy());
    Ok(image)
}

/// `registry:5000/team/name:tag@sha256:...` is `name`.
fn short_name(reference: &str) -> &str {
    let without_digest = reference.split_once('@').map_or(reference, |(name, _)| name);
    let last = without_digest.rsplit_once('/').map_or(without_digest, |(_, last)| last);
    last.split_once(':').map_or(last, |(name, _)| name)
}

impl From<Image> for api::Image {
    fn from(image: Image) -> Self {
        Self {
            repo_tags: image.references.iter().map(|name| format!("{name}:e2e")).collect(),
            // Not zero: kubelet would take it for an image that is still being pulled.
            size: 1,
            uid: Some(api::Int64Value { value: image.user.into() }),
            // Nothing here may be collected as garbage.
            pinned: true,
            id: image.id,
            ..Self::default()
        }
    }
}

fn failed(error: anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}

fn reference(spec: Option<api::ImageSpec>) -> String {
    spec.unwrap_or_default().image
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<api::ListImagesRequest>,
    ) -> Result<Response<api::ListImagesResponse>, Status> {
        let wanted = reference(request.into_inner().filter.and_then(|filter| filter.image));
        let images = if wanted.is_empty() { self.all() } else { self.find(&wanted).map(Vec::from_iter) };
        let images = images.map_err(failed)?.into_iter().map(Into::into).collect();
        Ok(Response::new(api::ListImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<api::ImageStatusRequest>,
    ) -> Result<Response<api::ImageStatusResponse>, Status> {
        let image = self.find(&reference(request.into_inner().image)).map_err(failed)?;
        Ok(Response::new(api::ImageStatusResponse { image: image.map(Into::into) }))
    }

    async fn pull_image(
        &self,
        request: Request<api::PullImageRequest>,
    ) -> Result<Response<api::PullImageResponse>, Status> {
        let image = self.get(&reference(request.into_inner().image));
        let image = image.map_err(|error| Status::not_found(format!("{error:#}")))?;
        Ok(Response::new(api::PullImageResponse { image_ref: image.id }))
    }

    async fn remove_image(
        &self,
        _: Request<api::RemoveImageRequest>,
    ) -> Result<Response<api::RemoveImageResponse>, Status> {
        Ok(Response::new(api::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<api::ImageFsInfoRequest>,
    ) -> Result<Response<api::ImageFsInfoResponse>, Status> {
        let usage = filesystems::usage(&self.dir).map_err(failed)?;
        Ok(Response::new(api::ImageFsInfoResponse {
            image_filesystems: vec![usage.clone()],
            container_filesystems: vec![usage],
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_its_name_and_by_its_id_whatever_registry_and_tag() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("prov.json"), r#"{"references": ["csi-provisioner"], "rootfs": "/r"}"#).unwrap();
        fs::write(dir.path().join("busybox.json"), r#"{"references": ["busybox"], "rootfs": null}"#).unwrap();
        fs::write(dir.path().join("notes.txt"), "no image").unwrap();
        let images = Images::new(dir.path().to_owned());
        let names = [
            "csi-provisioner",
            "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0",
            "localhost:5000/csi-provisioner@sha256:00",
            "zpod-e2e/prov",
        ];
        for name in names {
            assert_eq!(images.get(name).unwrap().rootfs.as_deref(), Some(Path::new("/r")), "{name}");
        }
        assert_eq!(images.get("busybox:1.37").unwrap().rootfs, None);
        let error = images.get("docker.io/nginx:1").unwrap_err().to_string();
        assert!(error.contains("docker.io/nginx:1") && error.contains("\"nginx\""), "{error}");
    }
}
